"""The gradients of one optimizer step, over its micro batches and over all processes.

The loss of a step is the sum over its units (trained tokens) divided by their number, over all micro batches
together; so how a step is cut into micro batches does not change it (the fault of huggingface/transformers#34191).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tune.cutting import cut
from tune.data.batches import Pack, StepPlan
from tune.memory import is_out_of_memory, release_memory
from tune.model import Trainable
from tune.objectives import Objective
from tune.parallel import Ranks
from tune.progress import TrainingOutOfMemoryError
from tune.sharding import is_part, run_empty_pass


class MicroBatchTooLargeError(Exception):
    """A process ran out of memory. No gradient is left, no weight was touched: the step can be tried again."""


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float
    """Mean over the step's units, as is everything here but the counts."""
    accuracy: float
    figures: dict[str, float]
    num_trained: int
    """Tokens that carried loss."""
    num_tokens: int
    """That went through the model, without padding."""
    faulty: tuple[int, ...]
    """Examples of this process in forward passes whose loss was not finite."""


def sequences_of(step: StepPlan) -> list[Pack]:
    return [sequence for micro_batch in step.micro_batches for sequence in micro_batch]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout and noise are drawn anew in every step, as a function of its number: a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def accumulate_gradients(
    trainable: Trainable,
    objective: Objective,
    step: StepPlan,
    *,
    micro_batch_size: int,
    ranks: Ranks,
    scaler: torch.amp.GradScaler | None,
) -> StepResult:
    """Leave the gradient of the step's loss in the parameters, which hold none before; scaled if there is a scaler.

    A process takes every ``ranks.size``-th sequence, so that long and short ones spread evenly.

    Raises:
        MicroBatchTooLargeError: in all processes, if one of them ran out of memory.
        TrainingOutOfMemoryError: the same of a sharded model. The others wait for this process in the middle of a
            layer, so the step cannot be tried again; their launcher ends them.
    """
    sequences = sequences_of(step)
    num_units = sum(objective.num_units(index) for sequence in sequences for index in sequence)
    mine = sequences[ranks.rank :: ranks.size]
    parameters = [parameter for _, parameter in trainable.parameters()]
    passes: _Passes | None = None
    try:
        passes = _run_passes(trainable, objective, mine, micro_batch_size, num_units, scaler, ranks)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if trainable.is_sharded:
            raise TrainingOutOfMemoryError(
                f"out of memory with micro batches of {micro_batch_size}, and a sharded step cannot be tried again; "
                "lower micro_batch_size and raise gradient_accumulation_steps, set gradient_checkpointing, or start "
                "more processes"
            ) from error
    if ranks.any(passes is None):
        for parameter in parameters:
            parameter.grad = None
        release_memory()
        raise MicroBatchTooLargeError
    assert passes is not None
    ranks.add_up_gradients([parameter for parameter in parameters if not is_part(parameter)])
    ranks.add_up(passes.sums)
    loss, hits, num_tokens, *figures = passes.sums.tolist()
    return StepResult(
        loss=loss / num_units,
        accuracy=hits / num_units,
        figures={name: figure / num_units for name, figure in zip(passes.names, figures, strict=True)},
        num_trained=sum(objective.num_trained(index) for sequence in sequences for index in sequence),
        num_tokens=round(num_tokens),
        faulty=passes.faulty,
    )


@dataclass(frozen=True, slots=True)
class _Passes:
    sums: torch.Tensor
    """[3 + figures] float64: loss, hits, tokens, figures in the order of ``names``."""
    names: tuple[str, ...]
    faulty: tuple[int, ...]


def _run_passes(
    trainable: Trainable,
    objective: Objective,
    sequences: Sequence[Pack],
    micro_batch_size: int,
    num_units: int,
    scaler: torch.amp.GradScaler | None,
    ranks: Ranks,
) -> _Passes:
    loss = hits = 0.0
    num_tokens = 0
    figures: dict[str, float] = {}
    faulty: list[int] = []
    lengths = [sum(objective.length(index) for index in sequence) for sequence in sequences]
    groups = cut(lengths, micro_batch_size, trainable.device.type)
    # Agreed on before the first pass: in the midst of them the others could not answer.
    num_empty_passes = ranks.most(len(groups)) - len(groups) if trainable.is_sharded else 0
    for chosen in groups:
        micro_batch = [sequences[number] for number in chosen]
        losses = objective.losses(trainable, micro_batch)
        share = losses.total / num_units
        (share if scaler is None else scaler.scale(share)).backward()
        pass_loss = float(losses.total.detach())
        if not math.isfinite(pass_loss):
            faulty += [index for sequence in micro_batch for index in sequence]
        loss += pass_loss
        hits += float(losses.hits)
        num_tokens += losses.num_tokens
        for name, figure in losses.figures.items():
            figures[name] = figures.get(name, 0.0) + float(figure)
    for _ in range(num_empty_passes):
        run_empty_pass(trainable)
    names = tuple(sorted(figures))
    sums = torch.tensor([loss, hits, num_tokens, *(figures[name] for name in names)], dtype=torch.float64)
    return _Passes(sums, names, tuple(faulty))
