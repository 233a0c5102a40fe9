"""Resumable checkpoints of a run: trained weights, optimizer and position, whole or not at all.

    checkpoint-<stage>-<step>/   weights, optimizer state, checkpoint.json
    best-<stage>-<step>/         the weights of the validation that was best so far, checkpoint.json

``checkpoint.json`` is written last and names every other file with its size and sha256; the directory appears by
rename after every file in it was synced. A directory whose record is missing or does not match its files is not
complete and never read. What is older goes once the newer is there. The run's fingerprint is stored with it, so that
another recipe or other data never continues from it. Tensors are stored as safetensors and the rest as JSON: nothing
is unpickled.

Batches and random numbers are pure functions of the recipe and the step (``tune.data.batches``, ``tune.step``), so the
position is a few numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from registry.errors import StorageError
from tune.digest import file_sha256
from tune.model import Trainable
from tune.parallel import Ranks
from tune.sharding import part_like, whole_of

_WEIGHTS, _STATE, _RECORD = "weights.safetensors", "state.safetensors", "checkpoint.json"


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
    best_step: int | None = None
    """In this stage, of the validation that was best so far; its weights are kept if the recipe asks for them."""
    best_valid_loss: float | None = None
    validations_without_gain: int = 0
    micro_batch_size: int | None = None
    """Sequences per forward pass: fewer than planned after memory ran out. ``None`` = as planned."""
    processed_tokens: int = 0
    """As ``trained_tokens``, but all that went through the model."""


class CheckpointFolder:
    """The checkpoints of one run below ``root``; one is kept, and the best weights that it names."""

    def __init__(self, root: Path, fingerprint: str, ranks: Ranks | None = None) -> None:
        self._root = root
        self._fingerprint = fingerprint
        self._ranks = ranks or Ranks()

    def save(
        self,
        position: Position,
        trainable: Trainable,
        optimizer: torch.optim.Optimizer | None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Path:
        """Write and make durable, in the first process. ``optimizer`` is ``None`` between stages. Collective: what is
        in parts is put together.

        Raises:
            StorageError: the disk refused; the checkpoint before stays.
        """
        final = self._root / f"checkpoint-{position.stage_index:02d}-{position.step:08d}"
        tensors = {_WEIGHTS: self._weights_of(trainable), _STATE: self._state_of(optimizer, scaler)}
        if not self._ranks.is_first:
            return final
        self._write(final, tensors, asdict(position))
        best = None if position.best_step is None else self._best_path(position.stage_index, position.best_step)
        for old in self._directories():
            if old not in (final, best):
                shutil.rmtree(old)
        return final

    def save_best(self, stage_index: int, step: int, trainable: Trainable) -> None:
        """Keep the weights of this step. Those kept before stay until the next checkpoint no longer names them.
        Collective.

        Raises:
            StorageError: the disk refused.
        """
        weights = self._weights_of(trainable)
        if self._ranks.is_first:
            self._write(self._best_path(stage_index, step), {_WEIGHTS: weights}, {})

    def restore_best(self, stage_index: int, step: int, trainable: Trainable) -> None:
        """Put the kept weights in place.

        Raises:
            StorageError: they are damaged or gone.
        """
        path = self._best_path(stage_index, step)
        if _complete_record(path) is None:
            raise StorageError(
                f"the best weights in {path} are damaged or gone; remove the work directory and train again"
            )
        _put_weights(path, trainable)

    def latest(self) -> tuple[Path, Position] | None:
        """The checkpoint to go on from, ``None`` when there is none of this very run that is complete."""
        for path in reversed(self._checkpoints()):
            record = _complete_record(path)
            if record is not None and record["fingerprint"] == self._fingerprint:
                return path, Position(**record["position"])
        return None

    def has_unusable(self) -> bool:
        """Whether there are checkpoints, but damaged ones, or of another recipe or other data."""
        return bool(self._checkpoints()) and self.latest() is None

    def clear(self) -> None:
        """Remove every checkpoint, of whatever run."""
        for path in self._directories():
            shutil.rmtree(path)

    def _write(self, final: Path, tensors: Mapping[str, dict[str, torch.Tensor]], position: dict[str, Any]) -> None:
        staging = final.with_name(f"{final.name}.partial")
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            for name, named in tensors.items():
                save_file(named, staging / name)
                _sync(staging / name)
            files = {name: _file_record(staging / name) for name in tensors}
            record = {"fingerprint": self._fingerprint, "position": position, "files": files}
            (staging / _RECORD).write_text(json.dumps(record), encoding="utf-8")
            _sync(staging / _RECORD)
            _sync(staging)
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            _sync(self._root)
        except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
            raise StorageError(f"cannot write the checkpoint {final}: {error}; free some space and resume") from error

    def _weights_of(self, trainable: Trainable) -> dict[str, torch.Tensor]:
        return self._whole(dict(trainable.parameters()))

    def _state_of(
        self, optimizer: torch.optim.Optimizer | None, scaler: torch.amp.GradScaler | None
    ) -> dict[str, torch.Tensor]:
        """``optimizer.<parameter>.<slot>``, ``optimizer_number.<parameter>.<slot>`` and ``scaler.0.<slot>``."""
        tensors: dict[str, torch.Tensor] = {}
        for index, parameter in enumerate(_parameters_of(optimizer) if optimizer is not None else ()):
            assert optimizer is not None
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    tensors[f"optimizer_number.{index}.{name}"] = torch.tensor(value)
        if scaler is not None:
            tensors |= {f"scaler.0.{name}": torch.tensor(value) for name, value in scaler.state_dict().items()}
        return self._whole(tensors)

    def _whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All of the tensors in the first process's memory, one by one; none in the others."""
        kept: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            whole = whole_of(tensor.detach())
            if self._ranks.is_first:
                whole = whole.cpu().contiguous()
                # All parameters share bitsandbytes' quantisation maps, and safetensors refuses shared memory.
                kept[name] = whole.clone() if ".qmap" in name else whole
        return kept

    def _best_path(self, stage_index: int, step: int) -> Path:
        return self._root / f"best-{stage_index:02d}-{step:08d}"

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in self._root.glob("checkpoint-*") if path.suffix != ".partial")

    def _directories(self) -> list[Path]:
        return [*self._root.glob("checkpoint-*"), *self._root.glob("best-*")]


def restore(
    path: Path,
    trainable: Trainable,
    optimizer: torch.optim.Optimizer | None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Put the weights of a checkpoint, and the state of its optimizer and scaler, back in place."""
    _put_weights(path, trainable)
    if optimizer is None:
        return
    parameters = _parameters_of(optimizer)
    for key, tensor in load_file(path / _STATE).items():
        owner, index, name = key.split(".", 2)
        if owner == "optimizer":
            parameter = parameters[int(index)]
            # A slot of the parameter's shape is cut as the parameter is; others, such as the step, are not.
            has_its_shape = tensor.shape == parameter.shape
            optimizer.state[parameter][name] = (
                part_like(parameter, tensor) if has_its_shape else tensor.to(parameter.device)
            )
        elif owner == "optimizer_number":  # bitsandbytes counts its steps in a plain int
            optimizer.state[parameters[int(index)]][name] = int(tensor)
        elif scaler is not None:
            scaler.load_state_dict({**scaler.state_dict(), name: tensor.item()})


def _put_weights(path: Path, trainable: Trainable) -> None:
    weights = load_file(path / _WEIGHTS)
    with torch.no_grad():
        for name, parameter in trainable.parameters():
            parameter.copy_(part_like(parameter, weights[name]))


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _complete_record(path: Path) -> dict[str, Any] | None:
    """The record of a directory whose files are those it names, byte for byte; ``None`` for any other."""
    try:
        record: dict[str, Any] = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        if all(_file_record(path / name) == expected for name, expected in record["files"].items()):
            return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, torn, or not ours
        pass
    return None


def _file_record(path: Path) -> dict[str, Any]:
    return {"size_bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
