"""An adapter added into its base's weights, shard by shard: ``W + scaling * B @ A`` in float32, then rounded once.

First everything is planned from the files' headers and every shape is checked; then tensors are streamed in blocks of
rows. At no time is more in memory than the adapter and a few blocks, whatever the model's size. Of a QLoRA adapter the
base is the original one, in its own precision: that is what it is served on, and what the recipe's base names.

Tied embeddings: an adapter on ``embed_tokens`` or ``lm_head`` changes one of two uses of one matrix. Both are then
written and the tie is undone in config.json, because merging into the shared matrix would change the other use too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file

from registry.adapter_config import read_adapter_config
from registry.adapter_files import WEIGHTS_NAME
from registry.errors import InvalidArtifactError
from registry.safetensors_header import MAX_BASE_HEADER_BYTES, SafetensorsHeader, TensorEntry, read_header
from tune.exports.model_files import INDEX_NAME, copy_companions
from tune.exports.shards import PlannedTensor, write_shard

BLOCK_BYTES = 16 << 20
"""Of the base's tensor, read and written at once."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Update:
    """``scaling * B @ A`` for one weight of [O, I]."""

    a: torch.Tensor
    """[R, I] float32"""
    b: torch.Tensor
    """[O, R] float32"""
    scaling: float

    def rows(self, start: int, end: int) -> torch.Tensor:
        return self.scaling * (self.b[start:end] @ self.a)  # [end - start, I]


@dataclass(frozen=True, slots=True)
class MergeNotes:
    """What a person should know about a merge."""

    num_updated: int
    dtype: str
    """As torch names it; the widest that was written."""
    is_untied: bool


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in one of the base's files."""

    path: Path
    data_start: int
    entry: TensorEntry


def merge(base_dir: Path, adapter_dir: Path, directory: Path, *, dtype: str = "base") -> MergeNotes:
    """Write the merged model into ``directory``, with the base's config and tokenizer.

    Raises:
        InvalidArtifactError: the adapter does not fit the base, or the base holds weights that cannot be added to.
        OSError: the disk refused.
    """
    updates = read_updates(adapter_dir)
    headers = {
        path.name: (path.resolve(), read_header(path.resolve(), max_header_bytes=MAX_BASE_HEADER_BYTES))
        for path in sorted(base_dir.glob("*.safetensors"))
    }
    stored = {
        entry.name: _Stored(path, header.data_start, entry)
        for path, header in headers.values()
        for entry in header.tensors.values()
    }
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    has_head = _HEAD in stored  # a tied base may store its head too; that file then writes it
    is_untied = _untie(updates, stored, config)
    _check(updates, stored, base_dir.name)
    placed: dict[str, str] = {}
    written: set[str] = set()
    total_bytes = 0
    for file_name, (_, header) in headers.items():
        names = _in_file_order(header)
        if is_untied and not has_head and _EMBEDDING in names:
            names.append(_HEAD)
        planned = [_plan(name, stored[name], updates.get(name), dtype) for name in names]
        write_shard(directory / file_name, planned, header.metadata or {"format": "pt"})
        placed |= dict.fromkeys(names, file_name)
        written |= {tensor.dtype for tensor in planned}
        total_bytes += sum(tensor.num_bytes for tensor in planned)
    widest = next(
        name for kind, name in (("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")) if kind in written
    )
    if is_untied:
        config["tie_word_embeddings"] = False
    if dtype != "base":
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if (base_dir / INDEX_NAME).is_file():
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(placed.items()))}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    copy_companions(base_dir, directory)
    return MergeNotes(num_updated=len(updates), dtype=widest, is_untied=is_untied)


def read_updates(adapter_dir: Path) -> dict[str, Update]:
    """By the name of the base's weight."""
    config = read_adapter_config(adapter_dir)
    tensors = load_file(adapter_dir / WEIGHTS_NAME)
    updates = {}
    for name, tensor in tensors.items():
        module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if side == "lora_A":
            b = tensors[f"base_model.model.{module}.lora_B.weight"]
            update = Update(tensor.float(), b.float(), config.scaling_of(module))
        elif side == "lora_embedding_A":
            # An embedding is [V, width] and its update (B @ A).T: A is [R, V], B [width, R].
            b = tensors[f"base_model.model.{module}.lora_embedding_B"]
            update = Update(b.float().T.contiguous(), tensor.float().T.contiguous(), config.scaling_of(module))
        else:
            continue
        updates[f"{module}.weight"] = update
    return updates


def _untie(updates: dict[str, Update], stored: dict[str, _Stored], config: dict[str, Any]) -> bool:
    """Give the head a matrix of its own where an update would touch a shared one. ``stored`` then has the embedding's
    values under the head's name, whatever the base stores there: a tied model takes its head from the embedding."""
    touched = {_EMBEDDING, _HEAD} & updates.keys()
    if not touched or not config.get("tie_word_embeddings", False):
        return False
    if _EMBEDDING not in stored:
        raise _unfit(
            f"it adapts {', '.join(sorted(touched))}, and the base keeps its tied embedding under another name"
        )
    stored[_HEAD] = stored[_EMBEDDING]
    return True


def _check(updates: dict[str, Update], stored: dict[str, _Stored], base_name: str) -> None:
    unknown = sorted(updates.keys() - stored.keys())
    if unknown:
        raise _unfit(f"{base_name} holds no weight {unknown[0]} ({len(unknown)} of {len(updates)} are missing)")
    for name, update in updates.items():
        entry = stored[name].entry
        shape = (update.b.shape[0], update.a.shape[1])
        if entry.shape != shape:
            raise _unfit(f"its update of {name} is {list(shape)}, the weight {list(entry.shape)}")
        if entry.dtype not in _DTYPES:
            raise _unfit(f"{name} is stored as {entry.dtype}; only F32, BF16 and F16 can be added to")


def _in_file_order(header: SafetensorsHeader) -> list[str]:
    return [entry.name for entry in sorted(header.tensors.values(), key=lambda entry: (entry.begin, entry.name))]


def _plan(name: str, source: _Stored, update: Update | None, dtype: str) -> PlannedTensor:
    is_float = source.entry.dtype in _DTYPES
    target = source.entry.dtype if dtype == "base" or not is_float else _NAMES[dtype]
    if update is None and target == source.entry.dtype:
        pieces: Callable[[], Iterator[bytes]] = partial(_copied, source)
    else:
        pieces = partial(_computed, source, update, _DTYPES[target])
    return PlannedTensor(name, target, source.entry.shape, pieces)


def _copied(source: _Stored) -> Iterator[bytes]:
    with _opened(source) as weights:
        left = source.entry.end - source.entry.begin
        while left > 0:
            piece = weights.read(min(left, BLOCK_BYTES))
            left -= len(piece)
            yield piece


def _computed(source: _Stored, update: Update | None, target: torch.dtype) -> Iterator[bytes]:
    """Rows of the tensor, in blocks: read, widened to float32, added to, rounded."""
    shape = source.entry.shape or (1,)
    row_bytes = (source.entry.end - source.entry.begin) // shape[0]
    block = max(1, BLOCK_BYTES // max(1, row_bytes))
    with _opened(source) as weights:
        for start in range(0, shape[0], block):
            end = min(start + block, shape[0])
            raw = bytearray(weights.read((end - start) * row_bytes))
            rows = torch.frombuffer(raw, dtype=_DTYPES[source.entry.dtype]).view(end - start, *shape[1:]).float()
            if update is not None:
                rows += update.rows(start, end)
            yield rows.to(target).contiguous().view(torch.uint8).numpy().tobytes()


def _opened(source: _Stored) -> BinaryIO:
    weights = source.path.open("rb")
    weights.seek(source.data_start + source.entry.begin)
    return weights


def _unfit(what: str) -> InvalidArtifactError:
    return InvalidArtifactError(
        f"The adapter cannot be merged: {what}. Name the base that it was trained on.", code="base_mismatch"
    )
