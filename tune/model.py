"""The base model in memory, and what of it is trained. Loads from local files only.

Arithmetic: ``float32`` computes everything in float32. ``bfloat16`` computes in bfloat16 under autocast while
every trained weight stays float32, because updates of 1e-4 of a weight vanish in bfloat16's 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from registry.errors import InvalidRequestError
from tune.choices import Choice
from tune.recipe import FullMethod, LoraMethod

DtypeName: TypeAlias = Literal["float32", "bfloat16"]
Model: TypeAlias = Any
"""A transformers causal language model, possibly wrapped by PEFT; neither ships types that mypy could follow."""

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Trainable:
    """A model ready to train. Owned by the run; mutated in place by it."""

    model: Model
    device: torch.device
    dtype: DtypeName
    target_modules: tuple[str, ...]
    """Leaf names of the adapted layers; empty for full training."""

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Trained parameters by name, in the model's own order."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == "float32":
            return nullcontext()
        context: AbstractContextManager[Any] = torch.autocast(self.device.type, dtype=torch.bfloat16)
        return context


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(asked: Literal["auto", "float32", "bfloat16"], device: torch.device) -> Choice[DtypeName]:
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
    return BaseShape(int(length) if length is not None else None, int(width) if width is not None else None)


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
    method: LoraMethod | FullMethod,
    *,
    dtype: DtypeName,
    device: torch.device,
    seed: int,
    gradient_checkpointing: bool,
) -> Trainable:
    """Load the base and mark what is trained. Adapters are initialised from ``seed``.

    Raises:
        InvalidRequestError: the base is quantised, or a target module names no linear layer of it.
    """
    if getattr(AutoConfig.from_pretrained(base_dir, local_files_only=True), "quantization_config", None) is not None:
        raise InvalidRequestError(
            f"the base in {base_dir.name} is quantised and cannot be trained; train on the model it was made from",
            param="base_model",
        )
    disable_progress_bar()  # of transformers, which would draw over the run's own
    trained_dtype = torch.float32 if method.kind == "full" else _TORCH_DTYPES[dtype]
    model = AutoModelForCausalLM.from_pretrained(
        base_dir, dtype=trained_dtype, local_files_only=True, attn_implementation="sdpa"
    ).to(device)
    model.config.use_cache = False
    if gradient_checkpointing:
        # Without reentrance the frozen embedding output needs no gradient for adapters behind it to get theirs.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if method.kind == "full":
        model.requires_grad_(True)
        return Trainable(model, device, dtype, ())
    targets = _resolve_targets(model, method.target_modules)
    torch.manual_seed(seed)
    return Trainable(_with_adapter(model, method, targets), device, dtype, targets)


def _with_adapter(model: Model, method: LoraMethod, targets: Sequence[str]) -> Model:
    from peft import LoraConfig, get_peft_model  # several seconds; full training does not need it

    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.scaled_alpha,
        lora_dropout=method.dropout,
        target_modules=list(targets),
        use_rslora=method.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with _no_gptq_layers():
        return get_peft_model(model, config, autocast_adapter_dtype=True)  # adapter weights in float32


@contextmanager
def _no_gptq_layers() -> Iterator[None]:
    """Keep PEFT from importing gptqmodel to ask whether our plain layers are quantised by it.

    The import takes 5 s, prints a banner to stdout and changes CUDA's environment variables.
    """
    with ExitStack() as stack:
        for name in ("tuners.lora.gptq", "tuners.lora.awq", "utils.other", "utils.quantization_utils"):
            asking = import_module(f"peft.{name}")
            stack.enter_context(patch.object(asking, "is_gptqmodel_available", lambda: False))
        yield


def _resolve_targets(model: Model, asked: Literal["all-linear"] | Sequence[str]) -> tuple[str, ...]:
    """Leaf names of linear layers, sorted. Never the output head: vLLM would have to hold it for each adapter."""
    head = model.get_output_embeddings()
    leaves = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if asked == "all-linear":
        return tuple(sorted(leaves))
    unknown = sorted(set(asked) - leaves)
    if unknown:
        raise InvalidRequestError(
            f"target_modules {unknown} name no linear layer of this base; it has {sorted(leaves)}",
            param="method.target_modules",
        )
    return tuple(sorted(set(asked)))


def round_weights(trainable: Trainable, save_dtype: DtypeName) -> None:
    """Round the trained weights to what will be stored, so that what is measured is what is published."""
    if save_dtype == "float32":
        return
    with torch.no_grad():
        for _, parameter in trainable.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
