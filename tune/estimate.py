"""What a run will take of memory and time, from a rehearsal of a few of its steps on this machine.

The rehearsal loads the base, makes the optimizer and runs the heaviest step of each stage, then steps of other sizes:
all with the run's own rows and code, and the weights are thrown away. Memory is what the process held at its peak, so
call it in a process that did nothing else before. Time is each step's padded tokens, put through the measured curve
(tokens -> seconds), plus loading and validations; reading data, writing checkpoints and publishing are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from tune.cutting import cut
from tune.memory import peak_bytes
from tune.model import Trainable, load_trainable
from tune.neftune import noisy_embeddings
from tune.objectives import Objective
from tune.optimizers import make_optimizer, set_learning_rate
from tune.parallel import Ranks
from tune.preparation import Prepared
from tune.stages import ReadyStage
from tune.step import MicroBatchTooLargeError, accumulate_gradients, sequences_of
from tune.train import evaluate, make_scaler

_QUANTILES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Of the steps' sizes; the heaviest first, because it decides the memory."""
_MOST_REPEATS = 5
_LONG_ENOUGH_SECONDS = 2.0
"""A step that takes this long is measured well enough by one repeat; short ones are repeated, and the median counts."""
_MOST_STEPS_LOOKED_AT = 2000
_MOST_VALIDATION_SEQUENCES = 64


@dataclass(frozen=True, slots=True)
class StageEstimate:
    label: str
    steps: int
    seconds: float
    """Steps and validations."""
    padded_tokens: int
    """That go through the model in training, padding included."""
    micro_batch_size: int
    """Smaller than the recipe's where that did not fit."""


@dataclass(frozen=True, slots=True)
class Estimate:
    peak_bytes: int
    """Of the process on a CPU, of its share of the GPU on a GPU."""
    process_bytes: int
    """Libraries and data, before the base was loaded; 0 on a GPU."""
    weights_bytes: int
    """All of the model's, trained or not."""
    training_bytes: int
    """Gradients and optimizer states."""
    load_seconds: float
    stages: tuple[StageEstimate, ...]

    @property
    def activations_bytes(self) -> int:
        """What is left of the peak: activations and buffers of the largest micro batch, and of loading."""
        return max(0, self.peak_bytes - self.process_bytes - self.weights_bytes - self.training_bytes)

    @property
    def seconds(self) -> float:
        return self.load_seconds + sum(stage.seconds for stage in self.stages)


def estimate(prepared: Prepared) -> Estimate:
    """Rehearse ``prepared``. Blocks for some seconds to minutes; publishes and keeps nothing."""
    recipe = prepared.recipe
    assert recipe.dtype != "auto", recipe.dtype
    before = psutil.Process().memory_info().rss if prepared.device.type == "cpu" else 0
    started = time.perf_counter()
    trainable = load_trainable(
        prepared.base.path,
        recipe.method,
        dtype=recipe.dtype,
        device=prepared.device,
        seed=recipe.seed,
        gradient_checkpointing=any(stage.gradient_checkpointing for stage in recipe.stages),
    )
    load_seconds = time.perf_counter() - started
    stages, training_bytes = [], 0
    for ready in prepared.stages:
        stage, optimizer_bytes = _rehearse(trainable, ready)
        stages.append(stage)
        training_bytes = max(training_bytes, optimizer_bytes)
    return Estimate(
        peak_bytes=peak_bytes(prepared.device),
        process_bytes=before,
        weights_bytes=sum(parameter.nbytes for parameter in trainable.model.parameters()),
        training_bytes=training_bytes + sum(parameter.nbytes for _, parameter in trainable.parameters()),
        load_seconds=load_seconds,
        stages=tuple(stages),
    )


def _rehearse(trainable: Trainable, ready: ReadyStage) -> tuple[StageEstimate, int]:
    """The estimate, and the bytes of the optimizer's states."""
    objective = ready.data.make_objective(ready.data.examples)
    total = len(ready.data.steps)
    device_type = trainable.device.type
    numbers = np.unique(np.linspace(0, total - 1, min(total, _MOST_STEPS_LOOKED_AT)).round().astype(int))
    assert ready.stage.micro_batch_size is not None, ready.stage
    sizes = np.array([_padded_tokens(ready, objective, int(number), device_type) for number in numbers])
    chosen = [int(numbers[np.argmin(np.abs(sizes - np.quantile(sizes, share)))]) for share in _QUANTILES]
    reference_seconds = _measure_reference(trainable, ready, chosen)
    run = _Rehearsal(trainable, ready, objective)
    curve = {
        _padded_tokens(ready, objective, number, device_type): run.seconds_of(number)
        for number in dict.fromkeys(chosen)
    }
    known = sorted(curve)
    seconds = float(np.interp(sizes, known, [curve[size] for size in known]).mean()) * total
    optimizer_bytes = sum(
        value.nbytes
        for slots in run.optimizer.state.values()
        for value in slots.values()
        if isinstance(value, torch.Tensor)
    )
    return (
        StageEstimate(
            label=ready.data.label,
            steps=total,
            seconds=seconds + reference_seconds + _validation_seconds(trainable, ready, total, run.micro_batch_size),
            padded_tokens=round(float(sizes.mean()) * total),
            micro_batch_size=run.micro_batch_size,
        ),
        optimizer_bytes,
    )


class _Rehearsal:
    """Runs steps of a stage for the time they take. The learning rate is 0, so that nothing diverges."""

    def __init__(self, trainable: Trainable, ready: ReadyStage, objective: Objective) -> None:
        self._trainable = trainable
        self._ready = ready
        self._objective = objective
        self._scaler = make_scaler(trainable)
        self._is_warm = False
        self.optimizer = make_optimizer(trainable, ready.stage, ready.learning_rate)
        self.micro_batch_size = ready.micro_batch_size

    def seconds_of(self, number: int) -> float:
        if not self._is_warm:  # allocations and first-use initialisation would count as work
            self._step(number)
            self._is_warm = True
        seconds = [self._step(number)]
        while len(seconds) < _MOST_REPEATS and sum(seconds) < _LONG_ENOUGH_SECONDS:
            seconds.append(self._step(number))
        return statistics.median(seconds)

    def _step(self, number: int) -> float:
        self._trainable.model.train()
        started = time.perf_counter()
        try:
            with noisy_embeddings(self._trainable.model, self._ready.stage.neftune_alpha):
                accumulate_gradients(
                    self._trainable,
                    self._objective,
                    self._ready.data.steps[number],
                    micro_batch_size=self.micro_batch_size,
                    ranks=Ranks(),
                    scaler=self._scaler,
                )
        except MicroBatchTooLargeError:
            if self.micro_batch_size == 1:
                raise
            self.micro_batch_size //= 2
            return self._step(number)
        parameters = [parameter for _, parameter in self._trainable.parameters()]
        torch.nn.utils.clip_grad_norm_(parameters, self._ready.stage.max_grad_norm)
        set_learning_rate(self.optimizer, 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._trainable.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def _padded_tokens(ready: ReadyStage, objective: Objective, number: int, device_type: str) -> int:
    sequences = sequences_of(ready.data.steps[number])
    lengths = [sum(map(objective.length, sequence)) for sequence in sequences]
    passes = cut(lengths, ready.micro_batch_size, device_type)
    return sum(len(chosen) * lengths[chosen[0]] for chosen in passes)


def _measure_reference(trainable: Trainable, ready: ReadyStage, step_numbers: Sequence[int]) -> float:
    """Give a dpo stage the reference of what is rehearsed; the seconds that all its pairs will take."""
    if ready.reference is None:
        return 0.0
    steps = [ready.data.steps[number] for number in step_numbers]
    indices = {index for step in steps for sequence in sequences_of(step) for index in sequence}
    started = time.perf_counter()
    ready.reference.measure(
        trainable, [ready.data.examples[index] for index in sorted(indices)], ready.micro_batch_size
    )
    rate = (time.perf_counter() - started) / len(indices)
    ready.reference.measure(trainable, _validation_sample(ready), ready.micro_batch_size)
    return rate * (len(ready.data.examples) + len(ready.data.validation))


def _validation_sample(ready: ReadyStage) -> list[Any]:
    """Of all lengths as they come."""
    examples = ready.data.validation
    number = min(len(examples), _MOST_VALIDATION_SEQUENCES)
    return [examples[int(index)] for index in np.linspace(0, len(examples) - 1, number)]


def _validation_seconds(trainable: Trainable, ready: ReadyStage, steps: int, micro_batch_size: int) -> float:
    """Before the first step, when they are due, after the last one, and once more on the published weights."""
    examples = ready.data.validation
    if not examples:
        return 0.0
    sample = _validation_sample(ready)
    started = time.perf_counter()
    evaluate(trainable, sample, micro_batch_size=micro_batch_size, make_objective=ready.data.make_objective)
    once = (time.perf_counter() - started) * len(examples) / len(sample)
    every = ready.stage.evaluate_every_steps
    return once * (3 + ((steps - 1) // every if every is not None else 0))


def describe(found: Estimate) -> list[str]:
    """Lines for a person."""
    lines = [
        f"memory: {_gib(found.peak_bytes)} at the peak: {_gib(found.process_bytes)} libraries and data, "
        f"{_gib(found.weights_bytes)} weights, {_gib(found.training_bytes)} gradients and optimizer, "
        f"{_gib(found.activations_bytes)} activations and buffers",
        f"time: {_duration(found.seconds)}, of which {_duration(found.load_seconds)} to load the base",
    ]
    for stage in found.stages:
        lines.append(
            f"  stage {stage.label}: {stage.steps} steps in {_duration(stage.seconds)}, {stage.padded_tokens:,} tokens "
            f"with padding, micro batches of {stage.micro_batch_size}"
        )
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
