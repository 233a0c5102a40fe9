"""The steps of epochs whose order is given."""

from __future__ import annotations

from collections.abc import Sequence

from tune.data.batches import Pack, StagePlan


def plan_steps(
    sequences_of_epoch: Sequence[Sequence[Pack]],
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    lengths: Sequence[int],
) -> StagePlan:
    """Each of these epochs cut into optimizer steps, whole."""
    return StagePlan(
        sequences_of_epoch.__getitem__,
        [len(sequences) for sequences in sequences_of_epoch],
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        lengths=lengths,
    )
