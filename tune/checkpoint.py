"""Resumable checkpoints of a run: trained weights, optimizer, random state and position, whole or not at all.

A checkpoint is a directory ``checkpoint-<stage>-<step>`` that appears by rename after every file in it was
synced; the older one goes once the newer is there. The run's fingerprint is stored with it, so that another
recipe or other data never continues from it. Batches are a pure function of the recipe (``tune.data.batches``),
so the position is two numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from registry.errors import StorageError
from tune.model import Trainable

_WEIGHTS, _STATE, _POSITION = "weights.safetensors", "state.safetensors", "position.json"


@dataclass(frozen=True, slots=True)
class Position:
    """Where the run stands."""

    stage_index: int
    step: int
    """Steps done in this stage."""
    trained_tokens: int
    steps_done: int
    """In earlier stages."""
    metrics: dict[str, float]
    """Figures measured so far."""


class CheckpointFolder:
    """The checkpoints of one run below ``root``; at most one is kept."""

    def __init__(self, root: Path, fingerprint: str) -> None:
        self._root = root
        self._fingerprint = fingerprint

    def save(self, position: Position, trainable: Trainable, optimizer: torch.optim.Optimizer | None) -> Path:
        """Write and make durable. ``optimizer`` is ``None`` between stages.

        Raises:
            StorageError: the disk refused; the checkpoint before stays.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        final = self._root / f"checkpoint-{position.stage_index:02d}-{position.step:08d}"
        staging = self._root / f"{final.name}.partial"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            save_file({n: p.detach().cpu().contiguous() for n, p in trainable.parameters()}, staging / _WEIGHTS)
            save_file(_optimizer_and_random_state(optimizer), staging / _STATE)
            record = {"fingerprint": self._fingerprint, **_as_json(position)}
            (staging / _POSITION).write_text(json.dumps(record), encoding="utf-8")
            for path in (*staging.iterdir(), staging):
                _sync(path)
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            _sync(self._root)
        except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
            raise StorageError(f"cannot write the checkpoint {final}: {error}; free some space and resume") from error
        for old in self._complete():
            if old != final:
                shutil.rmtree(old)
        return final

    def latest(self) -> tuple[Path, Position] | None:
        """The checkpoint to go on from, ``None`` when there is none of this very run."""
        for path in reversed(self._complete()):
            record = json.loads((path / _POSITION).read_text(encoding="utf-8"))
            if record.pop("fingerprint") == self._fingerprint:
                return path, Position(**record)
        return None

    def has_foreign(self) -> bool:
        """Whether there are checkpoints, but of another recipe or other data."""
        return bool(self._complete()) and self.latest() is None

    def clear(self) -> None:
        """Remove every checkpoint, of whatever run."""
        for path in self._root.glob("checkpoint-*"):
            shutil.rmtree(path)

    def _complete(self) -> list[Path]:
        return sorted(p for p in self._root.glob("checkpoint-*") if p.suffix != ".partial")


def restore(path: Path, trainable: Trainable, optimizer: torch.optim.Optimizer | None) -> None:
    """Put weights, optimizer and random state of a checkpoint back in place."""
    weights = load_file(path / _WEIGHTS)
    with torch.no_grad():
        for name, parameter in trainable.parameters():
            parameter.copy_(weights[name])
    state = load_file(path / _STATE)
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        owner, index, *rest = key.split(".")
        if owner == "optimizer":
            slots.setdefault(int(index), {})[".".join(rest)] = tensor
        elif owner == "cuda" and torch.cuda.is_available() and int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensor, int(index))
    torch.set_rng_state(state["cpu.0"])
    if optimizer is not None and slots:  # none between stages: each stage has an optimizer of its own
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def _optimizer_and_random_state(optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """``optimizer.<parameter>.<slot>``, ``cpu.0`` and ``cuda.<device>``: tensors only, so no pickle is needed."""
    tensors = {"cpu.0": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    if optimizer is not None:
        for index, slots in optimizer.state_dict()["state"].items():
            for name, tensor in slots.items():
                tensors[f"optimizer.{index}.{name}"] = tensor.detach().cpu().contiguous()
    return tensors


def _as_json(position: Position) -> dict[str, Any]:
    return {name: getattr(position, name) for name in Position.__slots__}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
