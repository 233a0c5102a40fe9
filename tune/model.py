"""The base model in memory, and what of it is trained. Loads from local files only.

Arithmetic: ``float32`` computes everything in float32. ``bfloat16`` computes in bfloat16 under autocast while
every trained weight stays float32, because updates of 1e-4 of a weight vanish in bfloat16's 8 bits. ``float16`` does
the same on a GPU, for those without bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from registry.errors import InvalidRequestError
from tune.adapters import Model as Model
from tune.adapters import attach_adapter
from tune.choices import Choice
from tune.freezing import train_some_weights
from tune.methods import FreezeMethod, FullMethod, Method, QloraMethod

DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""Of the arithmetic."""
StoredDtypeName: TypeAlias = Literal["float32", "bfloat16"]
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Trainable:
    """A model ready to train. Owned by the run; mutated in place by it."""

    model: Model
    device: torch.device
    dtype: DtypeName
    target_modules: tuple[str, ...] = ()
    """Leaf names of the adapted layers; empty where weights of the base are trained."""
    loraplus_ratio: float = 1.0
    """Learning rate of the B matrices over the stage's."""
    is_sharded: bool = False
    """Whether this process holds but a part of the weights, so that every forward pass takes all processes."""

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Trained parameters by name, in the model's own order."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def learning_rate_ratio(self, name: str) -> float:
        """Learning rate of the parameter ``name`` over the stage's."""
        return self.loraplus_ratio if ".lora_B." in name else 1.0

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == "float32":
            return nullcontext()
        context: AbstractContextManager[Any] = torch.autocast(self.device.type, dtype=_TORCH_DTYPES[self.dtype])
        return context


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(asked: Literal["auto"] | DtypeName, device: torch.device) -> Choice[DtypeName]:
    if asked == "float16" and device.type == "cpu":
        raise InvalidRequestError(
            "dtype=float16 needs a GPU: on a CPU it is slower than float32 and less exact; use float32 or bfloat16",
            param="dtype",
        )
    if asked != "auto":
        return Choice(asked, "given in the recipe")
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return Choice("bfloat16", f"{torch.cuda.get_device_name(device)} computes it natively")
    return Choice(
        "float32", "no GPU with bfloat16; on a CPU it is exact, and bfloat16 about twice as fast if avx512_bf16"
    )


def load_tokenizer(base_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_dir, local_files_only=True)


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What choices depend on; ``None`` where the base's config does not say."""

    context_tokens: int | None
    """The longest sequence the base was made for."""
    hidden_size: int | None


def base_shape(base_dir: Path) -> BaseShape:
    config = AutoConfig.from_pretrained(base_dir, local_files_only=True).get_text_config()
    length, width = getattr(config, "max_position_embeddings", None), getattr(config, "hidden_size", None)
    length = None if length is None else int(length * _rope_factor(config))
    return BaseShape(length, int(width) if width is not None else None)


def _rope_factor(config: Any) -> float:
    """By how much rotary positions reach beyond ``max_position_embeddings``, as vLLM 0.32 reads it (config/model.py,
    ``_get_and_verify_max_len``): for YaRN and the later ways the config names the longer context itself."""
    rope = getattr(config, "rope_parameters", None) or {}
    return float(rope.get("factor") or 1.0) if rope.get("rope_type") in ("linear", "dynamic") else 1.0


def stop_token_ids(base_dir: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens at which vLLM ends a completion: the tokenizer's eos and those of generation_config.json.

    Without that file vLLM reads the same key of config.json.
    """
    if (base_dir / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(base_dir, local_files_only=True)
    else:
        config = AutoConfig.from_pretrained(base_dir, local_files_only=True).get_text_config()
    listed = getattr(config, "eos_token_id", None)
    ids = set(listed) if isinstance(listed, list) else {listed}
    return frozenset(int(i) for i in ids | {tokenizer.eos_token_id} if i is not None)


def load_trainable(
    base_dir: Path,
    method: Method,
    *,
    dtype: DtypeName,
    device: torch.device,
    seed: int,
    gradient_checkpointing: bool,
) -> Trainable:
    """Load the base and mark what is trained. Adapters are initialised from ``seed``.

    Raises:
        InvalidRequestError: the base is quantised, or the method names a layer that it does not have.
    """
    if getattr(AutoConfig.from_pretrained(base_dir, local_files_only=True), "quantization_config", None) is not None:
        raise InvalidRequestError(
            f"the base in {base_dir.name} is quantised and cannot be trained; train on the model it was made from",
            param="base_model",
        )
    model = _load(base_dir, method, dtype=dtype, device=device)
    model.config.use_cache = False
    if gradient_checkpointing:
        # Without reentrance the frozen embedding output needs no gradient for adapters behind it to get theirs.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if isinstance(method, FullMethod):
        model.requires_grad_(True)
        return Trainable(model, device, dtype)
    if isinstance(method, FreezeMethod):
        train_some_weights(model, method)
        return Trainable(model, device, dtype)
    adapted, targets = attach_adapter(model, method, seed=seed)
    return Trainable(adapted, device, dtype, targets, loraplus_ratio=method.loraplus_ratio or 1.0)


def _load(base_dir: Path, method: Method, *, dtype: DtypeName, device: torch.device) -> Model:
    disable_progress_bar()  # of transformers, which would draw over the run's own
    options: dict[str, Any] = {
        "dtype": torch.float32 if isinstance(method, FullMethod) else _TORCH_DTYPES[dtype],
        "local_files_only": True,
        "attn_implementation": "sdpa",
    }
    if not isinstance(method, QloraMethod):
        return AutoModelForCausalLM.from_pretrained(base_dir, **options).to(device)
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=method.double_quantization,
        bnb_4bit_compute_dtype=_TORCH_DTYPES[dtype],
    )
    model = AutoModelForCausalLM.from_pretrained(base_dir, device_map={"": device}, **options)
    for module in model.modules():
        # On a CPU with avx512_bf16, bitsandbytes 0.50 packs a layer's weights for inference as soon as it runs in
        # evaluation mode. That form has no backward pass (bitsandbytes::gemv_4bit), and training that follows a
        # validation would go on with wrong gradients and a mere warning.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@contextmanager
def as_stored(trainable: Trainable, save_dtype: StoredDtypeName) -> Iterator[None]:
    """Inside the block the trained weights are what would be stored now; afterwards what they were, bit for bit."""
    kept = {name: parameter.detach().clone() for name, parameter in trainable.parameters()}
    round_weights(trainable, save_dtype)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in trainable.parameters():
                parameter.copy_(kept[name])


def round_weights(trainable: Trainable, save_dtype: StoredDtypeName, *, all_weights: bool = False) -> None:
    """Round the trained weights (or all) to what will be stored, so that what is measured is what is published."""
    if save_dtype == "float32":
        return
    rounded = trainable.model.parameters() if all_weights else (p for _, p in trainable.parameters())
    with torch.no_grad():
        for parameter in rounded:
            parameter.copy_(parameter.to(torch.bfloat16))
