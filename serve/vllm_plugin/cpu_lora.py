"""LoRA on the CPU, correct for mixed batches and without per-token copies of the weights.

Stock ``vllm.lora.punica_wrapper.punica_cpu`` (0.32.0) indexes the stacked weights with ``-1`` for tokens that
have no adapter. Python reads that as the last slot, so in a mixed batch base requests get the adapter that
sits there (vllm-project/vllm#48421). It also gathers and up-casts the whole A and B once per token.

Here every step groups its tokens by slot once, in :meth:`CapoPunicaWrapperCPU.update_metadata`. Each layer then runs
two dense products per *active* slot on just the rows that belong to it or, for a small step of several adapters, one
pair of products over all slots with the foreign ones masked out.

Letters: N tokens of the step, I input features, O output features, R rank of the slots, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows of one step that use one adapter slot."""

    slot: int
    rows: torch.Tensor | slice | None
    """``None``: every row of the step; a slice where the rows are contiguous (a view costs nothing)."""


_EVERY_ROW = _Group(slot=-1, rows=None)

# Up to here a step of several adapters is bound by the number of operations, above by their size (measured on 2 cores).
_SMALL_STEP_ROWS = 32


def group_rows(slots: list[int]) -> list[_Group]:
    """Group row numbers by slot; rows with a negative slot have no adapter and appear in no group."""
    rows_of: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            rows_of.setdefault(slot, []).append(row)
    groups = []
    for slot, rows in rows_of.items():
        first, last = rows[0], rows[-1]
        if len(rows) == len(slots):
            groups.append(_Group(slot, None))
        elif last - first + 1 == len(rows):
            groups.append(_Group(slot, slice(first, last + 1)))
        else:
            groups.append(_Group(slot, torch.tensor(rows, dtype=torch.long)))
    return groups


class _StepRows:
    """Which rows of one step belong to which slot, in the forms that the products need."""

    def __init__(self, slots: list[int]) -> None:
        self.num_rows = len(slots)
        self.groups = group_rows(slots)
        self._slots = slots
        self._masks: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}

    @property
    def is_small_mix(self) -> bool:
        """Several adapters and few rows: one product over all slots beats several over a few rows each."""
        return len(self.groups) > 1 and self.num_rows <= _SMALL_STEP_ROWS

    def mask(self, num_slots: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
        """(N, S * R): 1 where a row and a rank column belong to the same slot; made once a step."""
        key = (num_slots, rank, dtype)
        if key not in self._masks:
            own = torch.zeros(self.num_rows, num_slots, 1, dtype=dtype)
            rows = [row for row, slot in enumerate(self._slots) if slot >= 0]
            own[rows, [self._slots[row] for row in rows]] = 1
            self._masks[key] = own.expand(-1, -1, rank).reshape(self.num_rows, -1)
        return self._masks[key]


class CapoPunicaWrapperCPU(PunicaWrapperCPU):
    """Drop-in for vLLM's CPU wrapper; vLLM owns and calls it from its single worker thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens = _StepRows([])
        self._samples = _StepRows([])

    def update_metadata(self, mapping: Any, *args: Any, **kwargs: Any) -> None:
        """Called once per step before the model runs."""
        super().update_metadata(mapping, *args, **kwargs)
        self._tokens = _StepRows(self.token_lora_indices.tolist())
        self._samples = _StepRows(self.sampler_indices.tolist())

    def add_lora_linear(
        self,
        y: torch.Tensor,  # (N, sum of O) or (1, N, sum of O); changed in place
        x: torch.Tensor,  # (N, I)
        lora_a_stacked: tuple[torch.Tensor, ...],  # each (S, 1, R, I)
        lora_b_stacked: tuple[torch.Tensor, ...],  # each (S, 1, O, R)
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """``y[rows of s] += (x[rows of s] @ A[s].T) * scale @ B[s].T`` for each active slot s and output slice."""
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        offset = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            _add_low_rank(y, x, a, b, scale, offset, self._tokens)
            offset += width

    def add_lora_logits(
        self,
        y: torch.Tensor,  # (rows that are sampled, V); changed in place
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,  # (S, 1, R, I)
        lora_b_stacked: torch.Tensor,  # (S, 1, V, R)
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        _add_low_rank(y, x, lora_a_stacked, lora_b_stacked, scale, 0, self._samples)

    def add_lora_embedding(
        self,
        y: torch.Tensor,  # (N, O); changed in place
        x: torch.Tensor,  # (N, R): the embedding layer has applied A already
        lora_b_stacked: torch.Tensor,  # (S, 1, O, R)
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        for group in self._tokens.groups:
            b = lora_b_stacked[group.slot, 0]
            delta = _select(x, group).to(b.dtype) @ b.T
            _accumulate(y, group, 0, delta.to(y.dtype))


def _add_low_rank(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, offset: int, rows: _StepRows
) -> None:
    """Add each row's own low-rank update to the columns of ``y`` from ``offset`` on.

    vLLM folds alpha / r into B, so ``scale`` is 1 in practice.
    """
    if not rows.groups:
        return
    if rows.is_small_mix:
        num_slots, _, rank, num_in = a.shape
        hidden = x.to(a.dtype) @ a.view(-1, num_in).T  # (N, S * R)
        hidden = hidden * rows.mask(num_slots, rank, a.dtype)  # rank columns of other slots are nothing to a row
        if scale != 1.0:
            hidden = hidden * scale
        by_slot = hidden.view(-1, num_slots, rank).transpose(0, 1)  # (S, N, R)
        delta = torch.bmm(by_slot, b[:, 0].transpose(1, 2)).sum(0)  # (N, O)
        _accumulate(y, _EVERY_ROW, offset, delta.to(y.dtype))
        return
    for group in rows.groups:
        hidden = _select(x, group).to(a.dtype) @ a[group.slot, 0].T  # (n, R)
        if scale != 1.0:
            hidden = hidden * scale
        _accumulate(y, group, offset, (hidden @ b[group.slot, 0].T).to(y.dtype))


def _select(x: torch.Tensor, group: _Group) -> torch.Tensor:
    return x if group.rows is None else x[group.rows]


def _accumulate(y: torch.Tensor, group: _Group, offset: int, delta: torch.Tensor) -> None:
    # The adapter and the model may pad the output by different amounts; the shorter one counts.
    width = min(delta.shape[1], y.shape[1] - offset)
    target = y[:, offset : offset + width]
    delta = delta[:, :width]
    if group.rows is None:
        target += delta
    elif isinstance(group.rows, slice):
        target[group.rows] += delta
    else:
        target.index_add_(0, group.rows, delta)
