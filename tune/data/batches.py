"""Which examples meet in which step: a plan made once from the seed, so that any step can be found again.

A plan is a pure function of its inputs. To resume after step *n*, make the same plan and go on with step
*n* + 1; no iterator state needs to be stored. Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tune.data.packing import pack_best_fit

Pack = tuple[int, ...]
"""Examples (by index) that share one sequence; a single one without packing."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step: micro batches of sequences of example indices."""

    micro_batches: tuple[tuple[Pack, ...], ...]


def plan_epoch(
    source_of_example: Sequence[int],
    weights: Sequence[float],
    lengths: Sequence[int],
    *,
    pack_tokens: int | None,
    seed: int,
    epoch: int,
) -> list[Pack]:
    """The sequences of one epoch in training order.

    Args:
        source_of_example: for each example the index of its data source.
        weights: for each source how often the epoch visits its examples; a fraction draws anew each epoch.
        pack_tokens: capacity of a pack, or ``None`` for one example per sequence.
    """
    random = np.random.default_rng([seed, epoch])
    sources = np.asarray(source_of_example)
    visits: list[int] = []
    for source, weight in enumerate(weights):
        members = np.flatnonzero(sources == source)
        whole = math.floor(weight)
        part = round((weight - whole) * len(members))
        visits += members.tolist() * whole
        visits += random.permutation(members)[:part].tolist()
    order = [visits[i] for i in random.permutation(len(visits))]
    if pack_tokens is None:
        return [(index,) for index in order]
    packs = pack_best_fit([lengths[index] for index in order], pack_tokens)
    return [tuple(order[i] for i in packs[p]) for p in random.permutation(len(packs))]


def plan_steps(
    sequences_of_epoch: Sequence[Sequence[Pack]],
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    lengths: Sequence[int],
) -> list[StepPlan]:
    """Cut each epoch into optimizer steps; the last step of an epoch may be smaller.

    Within a step the sequences are sorted by length before they are cut into micro batches: loss and gradient of
    the step stay the same (they are sums over its tokens), and less is padded.
    """
    per_step = micro_batch_size * gradient_accumulation_steps
    steps = []
    for sequences in sequences_of_epoch:
        for start in range(0, len(sequences), per_step):
            chosen = sorted(sequences[start : start + per_step], key=lambda s: -sum(lengths[i] for i in s))
            micro = [tuple(chosen[i : i + micro_batch_size]) for i in range(0, len(chosen), micro_batch_size)]
            steps.append(StepPlan(tuple(micro)))
    return steps
