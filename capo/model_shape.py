"""The shape of a dense decoder, read from its ``config.json``: what its weights, adapter slots and cache are made of.

Needs neither torch nor vLLM. Every tensor here stands for one that vLLM 0.32 allocates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.errors import InvalidRequestError

_PLANNED = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Model types whose tensors are known here. Others have experts, latent attention or state of another form."""
_VOCABULARY_PADDING = 64
"""vllm/model_executor/layers/vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear layer as adapters name it."""

    name: str
    input_size: int
    output_size: int


@dataclass(frozen=True, slots=True)
class AdapterLayer:
    """One layer as vLLM allocates its slots: the projections of a packed layer go together."""

    name: str
    projections: tuple[Projection, ...]
    count: int
    """Layers of this kind in the model."""

    def elements(self, rank: int) -> int:
        """Of A and B of one slot, over all layers of the kind (vllm/lora/layers/base_linear.py and others)."""
        return self.count * sum(rank * (one.input_size + one.output_size) for one in self.projections)


@dataclass(frozen=True, slots=True)
class ModelShape:
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocabulary_size: int
    is_tied: bool
    """The output layer has no weights of its own."""
    has_query_key_value_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    dtype: str
    max_model_len: int

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def key_value_size(self) -> int:
        return self.num_kv_heads * self.head_size

    def num_parameters(self) -> int:
        """As vLLM holds them: a vocabulary is padded to whole blocks."""
        hidden, inner, both = self.hidden_size, self.intermediate_size, self.query_size + 2 * self.key_value_size
        attention = hidden * both + self.query_size * hidden
        attention += both * self.has_query_key_value_bias + hidden * self.has_output_bias
        mlp = 3 * hidden * inner + (2 * inner + hidden) * self.has_mlp_bias
        norms = 2 * hidden + (2 * self.head_size if self.model_type == "qwen3" else 0)
        padded = -(-self.vocabulary_size // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
        return self.num_layers * (attention + mlp + norms) + hidden + padded * hidden * (1 if self.is_tied else 2)

    def adapter_layers(self, target_modules: tuple[str, ...] | None) -> tuple[AdapterLayer, ...]:
        """Those that get slots; without ``target_modules`` all that vLLM knows of, the vocabulary's included.

        Raises:
            InvalidRequestError: a target that this model has not.
        """
        layers = self._every_adapter_layer()
        if target_modules is None:
            return layers
        known = {name for layer in layers for name in (layer.name, *(one.name for one in layer.projections))}
        if unknown := sorted(set(target_modules) - known):
            raise InvalidRequestError(
                f"target_modules {', '.join(unknown)}: this model has none such; it has {', '.join(sorted(known))}",
                param="target_modules",
            )
        return tuple(
            layer for layer in layers if {layer.name, *(one.name for one in layer.projections)} & set(target_modules)
        )

    def _every_adapter_layer(self) -> tuple[AdapterLayer, ...]:
        hidden, inner, count = self.hidden_size, self.intermediate_size, self.num_layers
        query, key_value = self.query_size, self.key_value_size
        layers = [
            AdapterLayer(
                "qkv_proj",
                (
                    Projection("q_proj", hidden, query),
                    Projection("k_proj", hidden, key_value),
                    Projection("v_proj", hidden, key_value),
                ),
                count,
            ),
            AdapterLayer("o_proj", (Projection("o_proj", query, hidden),), count),
            AdapterLayer(
                "gate_up_proj",
                (Projection("gate_proj", hidden, inner), Projection("up_proj", hidden, inner)),
                count,
            ),
            AdapterLayer("down_proj", (Projection("down_proj", inner, hidden),), count),
        ]
        if self.model_type != "qwen2":  # its class in vLLM names no embedding_modules
            layers.append(AdapterLayer("embed_tokens", (Projection("embed_tokens", self.vocabulary_size, hidden),), 1))
            layers.append(AdapterLayer("lm_head", (Projection("lm_head", hidden, self.vocabulary_size),), 1))
        return tuple(layers)

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Keys and values of all layers (vllm/v1/kv_cache_interface.py, AttentionSpec); sliding windows count whole."""
        return self.num_layers * self.num_kv_heads * 2 * self.head_size * element_bytes


def read_shape(path: Path) -> ModelShape:
    """The shape of the model in a directory, or of a ``config.json``.

    Raises:
        InvalidRequestError: there is none, or it is of a kind whose tensors are not known here.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"{file} cannot be read as a model's config.json; give a model's directory, its config.json, or capo-tiny",
            param="model",
        ) from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in _PLANNED:
        raise InvalidRequestError(
            f"model_type={model_type!r} cannot be planned; those whose tensors are known are {', '.join(_PLANNED)}",
            param="model",
        )
    try:
        return _shape(config, model_type)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(
            f"{file} lacks something that a {model_type} model has, or has it in another form: {error}", param="model"
        ) from error


def _shape(config: Mapping[str, Any], model_type: str) -> ModelShape:
    heads = _positive("num_attention_heads", config["num_attention_heads"])
    hidden_size = _positive("hidden_size", config["hidden_size"])
    attention_bias = bool(config.get("attention_bias", False))
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return ModelShape(
        model_type=model_type,
        num_layers=_positive("num_hidden_layers", config["num_hidden_layers"]),
        hidden_size=hidden_size,
        intermediate_size=_positive("intermediate_size", config["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=_positive("num_key_value_heads", config.get("num_key_value_heads") or heads),
        head_size=_positive("head_dim", config.get("head_dim") or hidden_size // heads),
        vocabulary_size=_positive("vocab_size", config["vocab_size"]),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        has_query_key_value_bias=model_type == "qwen2" or attention_bias,
        has_output_bias=model_type == "llama" and attention_bias,
        has_mlp_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
        dtype=dtype if dtype in DTYPE_BYTES else "bfloat16",
        max_model_len=_positive("max_position_embeddings", config["max_position_embeddings"]),
    )


def _positive(name: str, value: Any) -> int:
    number = int(value)
    if number < 1:
        raise ValueError(f"{name}={number} is below 1")
    return number
