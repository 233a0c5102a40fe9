"""The table of bases without adapted embeddings says what vLLM's own model classes say."""

from __future__ import annotations

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models import ModelRegistry

from registry.adapter_fit import WITHOUT_ADAPTED_EMBEDDINGS
from registry.adapter_shapes import LLAMA_SHAPED


@pytest.mark.parametrize("model_type", sorted(LLAMA_SHAPED))
def test_the_engine_takes_adapters_on_embeddings_where_the_table_says_so(model_type: str) -> None:
    assert AutoConfig.for_model(model_type).model_type == model_type
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    model_class = ModelRegistry._try_load_model_cls(architecture)
    assert bool(model_class.embedding_modules) == (model_type not in WITHOUT_ADAPTED_EMBEDDINGS)
