"""Which examples meet in which step: a plan made once from the seed, so that any step can be found again.

A plan is a pure function of its inputs. To resume after step *n*, make the same plan and go on with step
*n* + 1; no iterator state needs to be stored. Knows numbers only, and keeps one epoch of them in memory.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tune.data.packing import pack_best_fit

Pack = tuple[int, ...]
"""Examples (by index) that share one sequence; a single one without packing."""

_PACKED_TOGETHER = 65_536
"""Examples among which best fit looks for room; more would cost minutes and save next to nothing."""
_GROUPED_STEPS = 50
"""Steps whose sequences are sorted by length together; transformers' LengthGroupedSampler takes as many batches."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step: micro batches of sequences of example indices."""

    micro_batches: tuple[tuple[Pack, ...], ...]


class EpochPlan(Sequence[Pack]):
    """The sequences of one epoch in training order, as two arrays."""

    def __init__(self, order: NDArray[np.int64], ends: NDArray[np.int64] | None) -> None:
        """``order`` lists the examples, ``ends`` where each sequence ends in it; ``None`` = one example each."""
        self._order = order
        self._ends = ends

    def __len__(self) -> int:
        return len(self._order if self._ends is None else self._ends)

    @overload
    def __getitem__(self, number: int) -> Pack: ...
    @overload
    def __getitem__(self, number: slice) -> list[Pack]: ...
    def __getitem__(self, number: int | slice) -> Pack | list[Pack]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        if self._ends is None:
            return (int(self._order[number]),)
        start = int(self._ends[number - 1]) if number else 0
        return tuple(self._order[start : int(self._ends[number])].tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EpochPlan) or len(self) != len(other):
            return False
        ours, theirs = (np.arange(1, len(p) + 1) if p._ends is None else p._ends for p in (self, other))
        return np.array_equal(self._order, other._order) and np.array_equal(ours, theirs)


def plan_epoch(
    source_of_example: ArrayLike,
    weights: Sequence[float],
    lengths: ArrayLike,
    *,
    pack_tokens: int | None,
    seed: int,
    epoch: int,
    grouped_per_step: int | None = None,
) -> EpochPlan:
    """The sequences of one epoch in training order.

    Args:
        source_of_example: for each example the index of its data source.
        weights: for each source how often the epoch visits its examples; a fraction draws anew each epoch.
        pack_tokens: capacity of a pack, or ``None`` for one example per sequence.
        grouped_per_step: sequences of a step, where a step should hold examples of similar length.
    """
    random = np.random.default_rng([seed, epoch])
    sources, all_lengths = np.asarray(source_of_example), np.asarray(lengths)
    visits: list[NDArray[np.int64]] = []
    for source, weight in enumerate(weights):
        members = np.flatnonzero(sources == source)
        whole = math.floor(weight)
        part = round((weight - whole) * len(members))
        visits += [members] * whole
        visits.append(random.permutation(members)[:part])
    joined = np.concatenate(visits)
    order = joined[random.permutation(len(joined))]
    if pack_tokens is not None:
        return _packed(order, all_lengths, pack_tokens, random)
    if grouped_per_step is not None:
        order = _grouped(order, all_lengths, grouped_per_step, random)
    return EpochPlan(order, None)


def _packed(
    order: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int, random: np.random.Generator
) -> EpochPlan:
    packs: list[NDArray[np.int64]] = []
    for start in range(0, len(order), _PACKED_TOGETHER):
        block = order[start : start + _PACKED_TOGETHER]
        packs += [block[np.asarray(pack)] for pack in pack_best_fit(lengths[block].tolist(), capacity)]
    if not packs:
        return EpochPlan(order, None)
    shuffled = [packs[p] for p in random.permutation(len(packs))]
    ends = np.cumsum([len(pack) for pack in shuffled])
    return EpochPlan(np.concatenate(shuffled), ends)


def _grouped(
    order: NDArray[np.int64], lengths: NDArray[np.int64], per_step: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Sorted by length within runs of fifty steps; then whole steps are shuffled, the short last one stays last."""
    size = per_step * _GROUPED_STEPS
    runs = [order[start : start + size] for start in range(0, len(order), size)]
    by_length = np.concatenate([run[np.argsort(-lengths[run], kind="stable")] for run in runs] or [order])
    full = len(by_length) // per_step * per_step
    steps = by_length[:full].reshape(-1, per_step)
    return np.concatenate([steps[random.permutation(len(steps))].reshape(-1), by_length[full:]])


class StagePlan(Sequence[StepPlan]):
    """The steps of a stage, worked out when they are asked for; one epoch's order is kept.

    Within a step the sequences are sorted by length before they are cut into micro batches: loss and gradient of
    the step stay the same (they are sums over its tokens), and less is padded.
    """

    def __init__(
        self,
        sequences_of: Callable[[int], Sequence[Pack]],
        sizes: Sequence[int],
        *,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        lengths: Sequence[int] | NDArray[np.int32],
        max_steps: int | None = None,
    ) -> None:
        """``sizes``: how many sequences of each epoch are used; fewer than all where the last one is broken off."""
        self._sequences_of = sequences_of
        self._sizes = sizes
        self._micro_batch_size = micro_batch_size
        self._per_step = micro_batch_size * gradient_accumulation_steps
        self._lengths = lengths
        self._first_step = [0, *accumulate(-(-size // self._per_step) for size in sizes)]
        self._num_steps = min(self._first_step[-1], max_steps if max_steps is not None else self._first_step[-1])
        self._kept: tuple[int, Sequence[Pack]] | None = None

    def __len__(self) -> int:
        return self._num_steps

    @property
    def epoch_ends(self) -> tuple[int, ...]:
        """How many steps are done after each epoch; the last one counts, whole or broken off."""
        whole = [end for end in self._first_step[1:] if end < self._num_steps]
        return (*whole, self._num_steps)

    @overload
    def __getitem__(self, number: int) -> StepPlan: ...
    @overload
    def __getitem__(self, number: slice) -> list[StepPlan]: ...
    def __getitem__(self, number: int | slice) -> StepPlan | list[StepPlan]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        epoch = bisect_right(self._first_step, number) - 1
        start = (number - self._first_step[epoch]) * self._per_step
        sequences = self._epoch(epoch)[start : min(start + self._per_step, self._sizes[epoch])]
        chosen = sorted(sequences, key=lambda sequence: -sum(int(self._lengths[i]) for i in sequence))
        size = self._micro_batch_size
        return StepPlan(tuple(tuple(chosen[i : i + size]) for i in range(0, len(chosen), size)))

    def _epoch(self, epoch: int) -> Sequence[Pack]:
        if self._kept is None or self._kept[0] != epoch:
            self._kept = (epoch, self._sequences_of(epoch))
        return self._kept[1]
