"""LoRA on the CPU, correct for mixed batches and without per-token copies of the weights.

Stock ``vllm.lora.punica_wrapper.punica_cpu`` (0.32.0) indexes the stacked weights with ``-1`` for tokens that
have no adapter. Python reads that as the last slot, so in a mixed batch base requests get the adapter that
sits there (vllm-project/vllm#48421). It also gathers and up-casts the whole A and B once per token.

Here every step groups its tokens by slot once, in :meth:`CapoPunicaWrapperCPU.update_metadata`, and each layer
then runs two small dense products per *active* slot on just the rows that belong to it.

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


class CapoPunicaWrapperCPU(PunicaWrapperCPU):
    """Drop-in for vLLM's CPU wrapper; vLLM owns and calls it from its single worker thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_groups: list[_Group] = []
        self._sampler_groups: list[_Group] = []

    def update_metadata(self, mapping: Any, *args: Any, **kwargs: Any) -> None:
        """Called once per step before the model runs."""
        super().update_metadata(mapping, *args, **kwargs)
        self._token_groups = group_rows(self.token_lora_indices.tolist())
        self._sampler_groups = group_rows(self.sampler_indices.tolist())

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
        if not self._token_groups:
            return
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        for group in self._token_groups:
            x_rows = _select(x, group)
            offset = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                delta = _low_rank(x_rows, a[group.slot, 0], b[group.slot, 0], scale, y.dtype)
                _accumulate(y, group, offset, delta)
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
        for group in self._sampler_groups:
            delta = _low_rank(
                _select(x, group),
                lora_a_stacked[group.slot, 0],
                lora_b_stacked[group.slot, 0],
                scale,
                y.dtype,
            )
            _accumulate(y, group, 0, delta)

    def add_lora_embedding(
        self,
        y: torch.Tensor,  # (N, O); changed in place
        x: torch.Tensor,  # (N, R): the embedding layer has applied A already
        lora_b_stacked: torch.Tensor,  # (S, 1, O, R)
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        for group in self._token_groups:
            b = lora_b_stacked[group.slot, 0]
            delta = _select(x, group).to(b.dtype) @ b.T
            _accumulate(y, group, 0, delta.to(y.dtype))


def _select(x: torch.Tensor, group: _Group) -> torch.Tensor:
    return x if group.rows is None else x[group.rows]


def _low_rank(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """``(x @ a.T) * scale @ b.T`` in the weights' dtype. vLLM folds alpha / r into b, so scale is 1 in practice."""
    hidden = x.to(a.dtype) @ a.T  # (n, R)
    if scale != 1.0:
        hidden = hidden * scale
    return (hidden @ b.T).to(dtype)  # (n, O)


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
