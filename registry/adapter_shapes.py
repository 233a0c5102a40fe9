"""Which LoRA shapes fit a base model, read from its files without loading it.

For Llama-shaped models the configuration says everything, also for quantised weights. For others the headers of the
weights themselves say which modules there are, and the shapes of those that are not packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from registry.errors import InvalidArtifactError
from registry.safetensors_header import MAX_BASE_HEADER_BYTES, read_header
from registry.strict_json import parse_strict_json

# Models whose transformers implementation has exactly the modules that _llama_modules lists.
LLAMA_SHAPED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_FLOATS = frozenset({"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"})
# What holds the numbers of a quantised linear layer: bitsandbytes, GPTQ and AWQ, compressed-tensors.
_PACKED_KINDS = frozenset({"weight", "qweight", "weight_packed"})


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Features that a linear module takes and gives; of an embedding: vocabulary and width."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseShapes:
    modules: dict[str, ModuleShape]
    """By module name without ``.weight``, as in ``model.layers.0.self_attn.q_proj``."""
    packed: frozenset[str]
    """Modules that the weights name, but whose shape they do not show: they are quantised."""
    is_complete: bool
    """Whether ``modules`` are those of the model itself, each by its exact name. Else they are those of its weights:
    the model may name the outer parts of them otherwise, and use some only in part."""
    model_type: str


def read_base_shapes(directory: Path) -> BaseShapes:
    """What is known about the modules of the base model in ``directory``.

    Raises:
        InvalidArtifactError: its config.json or a weights file is malformed.
        OSError: a file cannot be read.
    """
    config = _read_config(directory)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise _bad_config("model_type", model_type)
    if model_type in LLAMA_SHAPED:
        return BaseShapes(_llama_modules(config), frozenset(), is_complete=True, model_type=model_type)
    return _shapes_of_weights(directory, model_type)


def _llama_modules(config: dict[str, object]) -> dict[str, ModuleShape]:
    """After transformers/models/llama/modeling_llama.py: LlamaAttention, LlamaMLP, LlamaForCausalLM."""
    hidden = _size(config, "hidden_size")
    intermediate = _size(config, "intermediate_size")
    heads = _size(config, "num_attention_heads")
    vocabulary = _size(config, "vocab_size")
    key_value_heads = _size(config, "num_key_value_heads", default=heads)
    head_dim = _size(config, "head_dim", default=hidden // heads)
    per_layer = {
        "self_attn.q_proj": ModuleShape(hidden, heads * head_dim),
        "self_attn.k_proj": ModuleShape(hidden, key_value_heads * head_dim),
        "self_attn.v_proj": ModuleShape(hidden, key_value_heads * head_dim),
        "self_attn.o_proj": ModuleShape(heads * head_dim, hidden),
        "mlp.gate_proj": ModuleShape(hidden, intermediate),
        "mlp.up_proj": ModuleShape(hidden, intermediate),
        "mlp.down_proj": ModuleShape(intermediate, hidden),
    }
    modules = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(_size(config, "num_hidden_layers"))
        for name, shape in per_layer.items()
    }
    modules["model.embed_tokens"] = ModuleShape(vocabulary, hidden)
    modules["lm_head"] = ModuleShape(hidden, vocabulary)
    return modules


def _shapes_of_weights(directory: Path, model_type: str) -> BaseShapes:
    """Every two-dimensional ``<module>.weight``: torch stores a linear's as (out, in), an embedding's as (vocab,
    width)."""
    modules: dict[str, ModuleShape] = {}
    packed: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        # A downloaded model's files are links into a cache.
        header = read_header(path.resolve(), max_header_bytes=MAX_BASE_HEADER_BYTES)
        for tensor in header.tensors.values():
            module, _, kind = tensor.name.rpartition(".")
            if kind == "weight" and len(tensor.shape) == 2 and tensor.dtype in _FLOATS:
                rows, columns = tensor.shape
                is_embedding = module.endswith("embed_tokens")
                modules[module] = ModuleShape(rows, columns) if is_embedding else ModuleShape(columns, rows)
            elif kind in _PACKED_KINDS and tensor.dtype not in _FLOATS:
                packed.add(module)
    for name, shape in list(modules.items()):
        if name.endswith("embed_tokens") and not any(module.endswith("lm_head") for module in modules):
            # The head's weights are those of the embedding, and are stored once.
            modules["lm_head"] = ModuleShape(shape.out_features, shape.in_features)
    return BaseShapes(modules, frozenset(packed), is_complete=False, model_type=model_type)


def _read_config(directory: Path) -> dict[str, object]:
    try:
        config = parse_strict_json((directory / "config.json").read_bytes())
    except ValueError as error:
        raise InvalidArtifactError(
            f"The base model's config.json is not JSON: {str(error)[:200]}.", code="invalid_base_model"
        ) from error
    if not isinstance(config, dict):
        raise _bad_config("the whole file", config)
    return config


def _size(config: dict[str, object], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        raise _bad_config(key, value)
    return value


def _bad_config(key: str, value: object) -> InvalidArtifactError:
    return InvalidArtifactError(
        f"The base model's config.json has {key} = {str(value)[:60]!r}, which cannot be. Check the base model's files.",
        code="invalid_base_model",
    )
