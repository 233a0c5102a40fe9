"""How much memory a base model, its adapter slots and its cache take, what is left, and which arguments fit.

Plain arithmetic over :class:`capo.model_shape.ModelShape`; what runs is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capo.model_shape import DTYPE_BYTES, ModelShape, read_shape
from registry.errors import InvalidRequestError
from registry.safetensors_header import MAX_BASE_HEADER_BYTES, read_header
from serve.engine_arguments import LORA_RANKS

GIB = 1024**3
_BLOCK_TOKENS = {"cpu": 128, "gpu": 16}
"""Of the cache, vLLM's defaults; a sequence takes whole blocks."""
_RESERVE_BYTES = {"cpu": GIB, "gpu": 3 * GIB}
"""For activations, CUDA graphs and libraries: a rule of thumb. A running engine's log has the true figure."""
_LARGEST_PERCENT = 95
"""Of a GPU: the driver and other processes have the rest."""
_ADAPTER_BYTES = 4
"""Capo publishes adapters in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What should run."""

    memory_bytes: int
    """Of the device: one GPU, or the part of the machine that the engine may take."""
    is_gpu: bool
    max_loras: int
    max_lora_rank: int
    context_tokens: int | None = None
    """Prompt and completion of one request; ``None``: the model's own bound."""
    concurrency: int
    """Requests of that length at once."""
    dtype: str | None = None
    """Of weights and cache; ``None``: the model's own."""
    target_modules: tuple[str, ...] | None = None
    """The only modules that get slots; ``None``: all that vLLM supports."""
    reserve_bytes: int | None = None
    disk_bytes: int | None = None
    """For the registry."""


@dataclass(frozen=True, slots=True)
class Plan:
    weights_bytes: int
    weights_from: str
    slot_bytes: int
    max_loras: int
    max_lora_rank: int
    kv_bytes_per_token: int
    context_tokens: int
    kv_bytes_per_request: int
    concurrency: int
    reserve_bytes: int
    memory_bytes: int
    usable_bytes: int
    """Of the memory, what an engine may ask for."""
    adapter_file_bytes: int
    """Of one adapter of that rank on the registry's disk."""
    adapters_on_disk: int | None
    most_slots: int
    """The most adapter slots that fit, everything else as wished."""
    most_requests: int
    """The most requests that fit, everything else as wished."""
    arguments: tuple[str, ...]
    """For ``capo serve --``."""
    reasons: tuple[str, ...]

    @property
    def slots_bytes(self) -> int:
        return self.slot_bytes * self.max_loras

    @property
    def kv_bytes(self) -> int:
        return self.kv_bytes_per_request * self.concurrency

    @property
    def left_bytes(self) -> int:
        """Less than nothing: it does not fit."""
        return self.usable_bytes - self.weights_bytes - self.slots_bytes - self.kv_bytes - self.reserve_bytes


def plan(path: Path, wish: Wish) -> Plan:
    """Raises:
    InvalidRequestError: the model cannot be planned, or the wish asks for what no engine takes.
    """
    if wish.memory_bytes < 1:
        raise InvalidRequestError(f"memory={wish.memory_bytes} bytes hold nothing; give at least 1", param="memory")
    if wish.target_modules is not None and not wish.target_modules:
        raise InvalidRequestError(
            "target_modules names none; leave it out for all that vLLM knows of", param="target_modules"
        )
    shape = read_shape(path)
    dtype = wish.dtype or shape.dtype
    if dtype not in DTYPE_BYTES:
        raise InvalidRequestError(f"dtype={dtype!r} is none of {', '.join(DTYPE_BYTES)}", param="dtype")
    rank = _engine_rank(wish.max_lora_rank)
    context_tokens = wish.context_tokens or shape.max_model_len
    if context_tokens > shape.max_model_len:
        raise InvalidRequestError(
            f"context={context_tokens} is above {shape.max_model_len}, the most tokens of this model", param="context"
        )
    weights_bytes, weights_from = _weights(path, shape, dtype)
    # On a CPU Capo keeps adapters in float32, which is quicker there (serve/engine.py).
    slot_dtype = dtype if wish.is_gpu else "float32"
    layers = shape.adapter_layers(wish.target_modules)
    slot_bytes = DTYPE_BYTES[slot_dtype] * sum(layer.elements(rank) for layer in layers)
    block = _BLOCK_TOKENS["gpu" if wish.is_gpu else "cpu"]
    per_token = shape.kv_bytes_per_token(DTYPE_BYTES[dtype])
    per_request = per_token * block * math.ceil(context_tokens / block)
    reserve = wish.reserve_bytes
    if reserve is None:
        reserve = _RESERVE_BYTES["gpu" if wish.is_gpu else "cpu"]
    usable = wish.memory_bytes * _LARGEST_PERCENT // 100 if wish.is_gpu else wish.memory_bytes
    room = usable - weights_bytes - reserve
    file_bytes = _adapter_file_bytes(shape, wish.target_modules, wish.max_lora_rank)
    arguments, reasons = _arguments(
        wish, rank, context_tokens, needed=weights_bytes + reserve + slot_bytes * wish.max_loras,
        kv_bytes=per_request * wish.concurrency,
    )  # fmt: skip
    return Plan(
        weights_bytes=weights_bytes,
        weights_from=weights_from,
        slot_bytes=slot_bytes,
        max_loras=wish.max_loras,
        max_lora_rank=rank,
        kv_bytes_per_token=per_token,
        context_tokens=context_tokens,
        kv_bytes_per_request=per_request,
        concurrency=wish.concurrency,
        reserve_bytes=reserve,
        memory_bytes=wish.memory_bytes,
        usable_bytes=usable,
        adapter_file_bytes=file_bytes,
        adapters_on_disk=None if wish.disk_bytes is None else wish.disk_bytes // file_bytes,
        most_slots=max(0, (room - per_request * wish.concurrency) // slot_bytes),
        most_requests=max(0, (room - slot_bytes * wish.max_loras) // per_request),
        arguments=tuple(arguments),
        reasons=tuple(reasons),
    )


def _engine_rank(rank: int) -> int:
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise InvalidRequestError(
        f"max_lora_rank={rank} is above {LORA_RANKS[-1]}, the largest of vLLM; train smaller adapters, or merge them",
        param="max_lora_rank",
    )


def _weights(path: Path, shape: ModelShape, dtype: str) -> tuple[int, str]:
    """Of the files where they are at hand: they know of quantisation, and of what a formula leaves out."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        return shape.num_parameters() * DTYPE_BYTES[dtype], "formula"
    total = 0
    for file in files:
        for tensor in read_header(file, max_header_bytes=MAX_BASE_HEADER_BYTES).tensors.values():
            is_float = tensor.dtype in ("F32", "F16", "BF16")
            total += math.prod(tensor.shape) * DTYPE_BYTES[dtype] if is_float else tensor.end - tensor.begin
    return total, "safetensors headers"


def _adapter_file_bytes(shape: ModelShape, target_modules: Sequence[str] | None, rank: int) -> int:
    """A and B of the projections that the adapter names; by default the linear layers of all blocks."""
    projections = [
        (layer.count, one)
        for layer in shape.adapter_layers(None)
        for one in layer.projections
        if (one.name in target_modules or layer.name in target_modules if target_modules else layer.count > 1)
    ]
    return _ADAPTER_BYTES * sum(count * rank * (one.input_size + one.output_size) for count, one in projections)


def _arguments(
    wish: Wish, rank: int, context_tokens: int, *, needed: int, kv_bytes: int
) -> tuple[list[str], list[str]]:
    arguments = ["--max-loras", str(wish.max_loras), "--max-lora-rank", str(rank)]
    reasons = []
    if rank != wish.max_lora_rank:
        reasons.append(f"vLLM knows no rank {wish.max_lora_rank}; slots have the next larger one, {rank}")
    arguments += ["--max-model-len", str(context_tokens), "--max-num-seqs", str(wish.concurrency)]
    if wish.target_modules is not None:
        arguments += ["--lora-target-modules", *wish.target_modules]
        reasons.append("adapters that change other modules are refused with --lora-target-modules")
    if not wish.is_gpu:
        return [*arguments, "--kv-cache-memory-bytes", str(kv_bytes)], reasons
    percent = -(-100 * (needed + kv_bytes) // wish.memory_bytes)
    if percent > _LARGEST_PERCENT:
        reasons.append(f"it would take {percent} % of the GPU; {_LARGEST_PERCENT} % is what can be asked for")
    arguments += ["--gpu-memory-utilization", f"{min(percent, _LARGEST_PERCENT) / 100:.2f}"]
    return arguments, reasons
