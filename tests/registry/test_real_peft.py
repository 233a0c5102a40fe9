"""Adapters and models made by the real libraries: what PEFT writes is accepted, and the shapes are transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from registry import BaseModel, Registry, check_adapter, locate_base_model
from registry.adapter_shapes import read_base_shapes
from registry.errors import InvalidArtifactError

pytestmark = pytest.mark.training

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "head_dim": 16,  # not hidden_size / num_attention_heads: that is what the configuration is read for
    "tie_word_embeddings": False,
}


def _model(model_type: str = "llama", **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **options))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    _model().save_pretrained(directory)
    return locate_base_model(str(directory))


def _save_adapter(directory: Path, **options: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options))
    # Else PEFT adds copies of the base's embeddings where an embedding is adapted.
    get_peft_model(_model(), config).save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    return directory


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_shapes_read_from_a_configuration_are_those_of_the_real_model(tmp_path: Path, model_type: str) -> None:
    import torch

    model = _model(model_type)
    model.save_pretrained(tmp_path / "model")
    real = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    real["model.embed_tokens"] = (SIZES["vocab_size"], SIZES["hidden_size"])
    shapes = read_base_shapes(tmp_path / "model")
    assert {name: (shape.in_features, shape.out_features) for name, shape in shapes.modules.items()} == real


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 2}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.mlp\.(up|down)_proj"},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "task_type": None},
    ],
    ids=str,
)
def test_an_adapter_that_peft_made_is_imported(tmp_path: Path, base: BaseModel, options: dict[str, Any]) -> None:
    from safetensors.numpy import load_file

    source = _save_adapter(tmp_path / "adapter", **options)
    registry = Registry(tmp_path / "registry")
    artifact = registry.import_adapter(source, name="support", base_model=base, alias="support")
    assert registry.verify("support") == []
    lora = artifact.manifest.lora
    assert lora is not None
    tensors = load_file(source / "adapter_model.safetensors")
    assert lora.rank == max(min(tensor.shape) for tensor in tensors.values())
    report = check_adapter(artifact.path, base_model=base)
    assert report.num_parameters == sum(tensor.size for tensor in tensors.values())
    assert 2 * len(report.modules) == len(tensors)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_neox", "bloom", "starcoder2"])
def test_an_adapter_of_an_architecture_that_is_known_by_its_weights_fits_them(tmp_path: Path, model_type: str) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.numpy import load_file, save_file

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    layers = {"n_layer": 2, "n_head": 4} if model_type == "bloom" else {}
    model = _model(model_type, **tokens, **layers)
    model.save_pretrained(tmp_path / "model")
    base = locate_base_model(str(tmp_path / "model"))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink()
    (note,) = check_adapter(tmp_path / "adapter", base_model=base).notes
    assert note.startswith("Whether modules are missing")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name.replace(".1.", ".2.", 1): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    with pytest.raises(InvalidArtifactError) as caught:
        check_adapter(tmp_path / "adapter", base_model=base)
    assert caught.value.code == "base_mismatch"


@pytest.mark.filterwarnings("ignore:.*(lora_bias|LoRA tensor):UserWarning")
@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "unsupported_dora"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "unsupported_bias"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "unsupported_lora_bias"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "unsupported_modules_to_save"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "unsupported_init"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "unsupported_trainable_token_indices"),
    ],
    ids=str,
)
def test_an_adapter_that_the_engine_cannot_serve_is_refused(
    tmp_path: Path, base: BaseModel, options: dict[str, Any], code: str
) -> None:
    source = _save_adapter(tmp_path / "adapter", **options)
    with pytest.raises(InvalidArtifactError) as caught:
        Registry(tmp_path / "registry").import_adapter(source, name="support", base_model=base)
    assert caught.value.code == code
