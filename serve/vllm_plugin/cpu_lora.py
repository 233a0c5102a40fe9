"""LoRA on the CPU, correct for mixed batches and without per-token copies of the weights.

Stock ``vllm.lora.punica_wrapper.punica_cpu`` (0.32.0) indexes the stacked weights with ``-1`` for tokens that
have no adapter. Python reads that as the last slot, so in a mixed batch base requests get the adapter that
sits there (vllm-project/vllm#48421). It also gathers and up-casts the whole A and B once per token.

Here every step groups its tokens by slot once, in :meth:`CapoPunicaWrapperCPU.update_metadata`. Each layer then
multiplies the rows of each *active* slot with its A and B or, for a small step of several adapters, all rows with the
A and B of all slots, with the foreign ones masked out. A small step is bound by the number of operations, so the
weights of a layer's output slices (query, key and value are one layer) are kept in one tensor: one product with A.

Letters: N tokens of the step, I input features, O output features, R rank of the slots, S slots, P output slices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

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
        self.slots = slots
        self._foreign: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def is_small_mix(self) -> bool:
        """Several adapters and few rows: one product over all slots beats several over a few rows each."""
        return len(self.groups) > 1 and self.num_rows <= _SMALL_STEP_ROWS

    def foreign(self, num_slots: int, rank: int) -> torch.Tensor:
        """(N, S * rank): where a row and a rank column belong to different slots; made once a step."""
        key = (num_slots, rank)
        if key not in self._foreign:
            foreign = torch.ones(self.num_rows, num_slots, 1, dtype=torch.bool)
            rows = [row for row, slot in enumerate(self.slots) if slot >= 0]
            foreign[rows, [self.slots[row] for row in rows]] = False
            self._foreign[key] = foreign.expand(-1, -1, rank).reshape(self.num_rows, -1)
        return self._foreign[key]


class CapoPunicaWrapperCPU(PunicaWrapperCPU):
    """Drop-in for vLLM's CPU wrapper; vLLM owns and calls it from its single worker thread."""

    _prompt_row: ClassVar[int | None] = None

    @classmethod
    @contextmanager
    def logits_of_prompt(cls, row: int) -> Iterator[None]:
        """Logits that are computed within are of one prompt, which the step has at ``row`` and behind."""
        cls._prompt_row = row
        try:
            yield
        finally:
            cls._prompt_row = None

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
        if not self._tokens.groups:
            return
        packed = getattr(lora_a_stacked[0], "capo_packed", None)
        if packed is None:
            packed = lora_a_stacked[0].capo_packed = _Packed.of(lora_a_stacked, lora_b_stacked, output_slices)
        packed.add(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), scale, self._tokens)

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
        x = x.view(-1, x.shape[-1])
        rows = self._samples
        if self._prompt_row is not None:
            rows = _StepRows([self._tokens.slots[self._prompt_row]] * x.shape[0])
        if not rows.groups:
            return
        packed = getattr(lora_a_stacked, "capo_packed", None)
        if packed is None:
            packed = _Packed.of((lora_a_stacked,), (lora_b_stacked,), (lora_b_stacked.shape[2],))
            lora_a_stacked.capo_packed = packed
        packed.add(y.view(-1, y.shape[-1]), x, scale, rows)

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
            _accumulate(y, group, slice(None), _select(x, group).to(b.dtype), b.T, 1.0)


class _Packed:
    """The adapter weights of one layer, laid out for few and large products.

    vLLM's own stacked tensors become views of this storage, so what it writes into a slot is seen here at once. They
    keep their shapes; this object lives as an attribute of the first of them and is made at the layer's first use.
    """

    def __init__(self, a: torch.Tensor, b: list[torch.Tensor], columns: list[slice]) -> None:
        self._a = a
        """(S, P, R, I)"""
        self._b = b
        """By output slice: (S, R, O)."""
        self._columns = columns
        """Of ``y``, by output slice."""

    @classmethod
    def of(
        cls, a_stacked: tuple[torch.Tensor, ...], b_stacked: tuple[torch.Tensor, ...], output_slices: tuple[int, ...]
    ) -> _Packed:
        a = torch.stack([one[:, 0] for one in a_stacked], dim=1)
        b = [one[:, 0].transpose(1, 2).contiguous() for one in b_stacked]
        for place, one in enumerate(a_stacked):
            one.set_(a[:, place : place + 1])
        for one, packed in zip(b_stacked, b, strict=True):
            one.set_(packed.transpose(1, 2).unsqueeze(1))
        ends = list(itertools.accumulate(output_slices))
        return cls(a, b, [slice(end - width, end) for end, width in zip(ends, output_slices, strict=True)])

    def add(self, y: torch.Tensor, x: torch.Tensor, scale: float, rows: _StepRows) -> None:
        """Add each row's own low-rank update to ``y`` (N, sum of O) in place. ``rows`` has a group.

        vLLM folds alpha / r into B, so ``scale`` is 1 in practice.
        """
        num_slots, num_slices, rank, num_in = self._a.shape
        x = x.to(self._a.dtype)
        if rows.is_small_mix:
            hidden = x @ self._a.view(-1, num_in).T  # (N, S * P * R)
            # Rank columns of other slots are nothing to a row; times 0 they would be NaN where they are infinite.
            hidden.masked_fill_(rows.foreign(num_slots, num_slices * rank), 0)
            hidden = hidden.view(-1, num_slots, num_slices, rank)
            for place, (b, columns) in enumerate(zip(self._b, self._columns, strict=True)):
                of_slice = hidden[:, :, place].reshape(-1, num_slots * rank)
                _accumulate(y, _EVERY_ROW, columns, of_slice, b.view(num_slots * rank, -1), scale)
            return
        for group in rows.groups:
            hidden = _select(x, group) @ self._a[group.slot].view(-1, num_in).T  # (n, P * R)
            for place, (b, columns) in enumerate(zip(self._b, self._columns, strict=True)):
                of_slice = hidden[:, place * rank : (place + 1) * rank]
                _accumulate(y, group, columns, of_slice, b[group.slot], scale)


def _select(x: torch.Tensor, group: _Group) -> torch.Tensor:
    return x if group.rows is None else x[group.rows]


def _accumulate(
    y: torch.Tensor, group: _Group, columns: slice, hidden: torch.Tensor, b: torch.Tensor, scale: float
) -> None:
    """``y[rows, columns] += scale * hidden @ b``, for ``hidden`` (n, R) and ``b`` (R, O)."""
    # The adapter and the model may pad the output by different amounts; the shorter one counts.
    target = y[:, columns]
    b = b[:, : target.shape[1]]
    target = target[:, : b.shape[1]]
    if not isinstance(group.rows, torch.Tensor) and y.dtype == b.dtype:
        (target if group.rows is None else target[group.rows]).addmm_(hidden, b, alpha=scale)
        return
    delta = hidden @ b
    if group.rows is None:
        target.add_(delta, alpha=scale)
    elif isinstance(group.rows, slice):
        target[group.rows].add_(delta, alpha=scale)
    else:
        target.index_add_(0, group.rows, delta.to(y.dtype), alpha=scale)
