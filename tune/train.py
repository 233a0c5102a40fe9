"""The training loop of one stage, on plain torch: flat, in sections, one step after another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tune.data.batches import StepPlan
from tune.memory import is_out_of_memory, release_memory
from tune.model import Trainable
from tune.neftune import noisy_embeddings
from tune.objectives import LanguageModelling, Objective
from tune.optimizers import set_learning_rate
from tune.parallel import Ranks
from tune.progress import (
    Observer,
    StepMetrics,
    StopRequested,
    TrainingDivergedError,
    TrainingEvent,
    TrainingOutOfMemoryError,
)
from tune.recipe import Stage
from tune.schedules import learning_rate_share
from tune.sharding import clip_gradients, run_empty_pass
from tune.step import MicroBatchTooLargeError, StepResult, accumulate_gradients, seed_step, sequences_of

_SHOWN_ROWS = 8
_SMALLEST_LOSS_SCALE = 1.0
"""A gradient that overflows float16 even at this scale is not a matter of scaling."""


@dataclass(frozen=True, slots=True)
class StageData:
    """What one stage trains on, ready to run."""

    label: str
    """``StepMetrics.stage``."""
    examples: Sequence[Any]
    """``tune.data.mask.Example``, or what ``make_objective`` takes."""
    steps: Sequence[StepPlan]
    validation: Sequence[Any]
    """May be empty."""
    make_objective: Callable[[Sequence[Any]], Objective] = LanguageModelling
    name_row: Callable[[int], str] = str
    """Tells a person where an example of ``examples`` stands: ``train.jsonl:7``."""
    seed: int = 0
    """Of dropout and noise."""
    epoch_ends: Sequence[int] = ()
    """Numbers of steps after which an epoch is complete."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    loss: float
    """Mean cross-entropy in nats over all trained tokens."""
    mean_token_accuracy: float

    def named(self, stage: str, prefix: str = "") -> dict[str, float]:
        """As the manifest's metrics name them."""
        return {
            f"{stage}.{prefix}valid_loss": self.loss,
            f"{stage}.{prefix}valid_mean_token_accuracy": self.mean_token_accuracy,
        }


@dataclass(frozen=True, slots=True)
class Best:
    """The validation that was best so far."""

    step: int
    valid_loss: float


@dataclass(slots=True)
class StageState:
    """Where a stage stands; what a checkpoint must hold beside the weights."""

    optimizer: torch.optim.Optimizer
    step: int
    """Steps done."""
    trained_tokens: int
    """Since the run began, earlier stages included."""
    processed_tokens: int = 0
    """The same, of all tokens that went through the model."""
    last_train_loss: float = math.nan
    last_train_accuracy: float = math.nan
    best: Best | None = None
    validations_without_gain: int = 0
    micro_batch_size: int | None = None
    """Sequences per forward pass: fewer than planned after memory ran out. ``None`` = as planned."""
    scaler: torch.amp.GradScaler | None = None
    """For float16 only."""


def make_scaler(trainable: Trainable) -> torch.amp.GradScaler | None:
    """Gradients of a float16 run vanish below 6e-8 unless the loss is scaled up (https://arxiv.org/abs/1710.03740)."""
    return torch.amp.GradScaler(trainable.device.type) if trainable.dtype == "float16" else None


def train_stage(
    trainable: Trainable,
    stage: Stage,
    data: StageData,
    state: StageState,
    *,
    learning_rate: float,
    observer: Observer,
    should_stop: Callable[[], str | None],
    save_checkpoint: Callable[[StageState], None],
    save_best: Callable[[Best], None] = lambda best: None,
    end_epoch: Callable[[StageState], None] = lambda state: None,
    checkpoint_every_steps: int | None,
    ranks: Ranks | None = None,
    steps_before: int = 0,
    steps_after: int = 0,
) -> None:
    """Run the stage from ``state.step`` to its end, mutating model and ``state``.

    ``end_epoch`` is called after each epoch that is complete, in every process; it leaves model and ``state`` as they
    are. ``steps_before`` and ``steps_after`` are those of the run's other stages.

    Raises:
        TrainingDivergedError: names the step and its rows.
        TrainingOutOfMemoryError: not even one sequence at a time fits.
        StopRequested: ``should_stop`` gave a reason; a checkpoint was saved.
    """
    ranks = ranks or Ranks()
    objective = data.make_objective(data.examples)
    parameters = [parameter for _, parameter in trainable.parameters()]
    total_steps = len(data.steps)
    assert stage.micro_batch_size is not None, stage
    state.micro_batch_size = state.micro_batch_size or stage.micro_batch_size
    seconds_per_step = 0.0
    trainable.model.train()
    while state.step < total_steps:
        # --- stop at the step boundary
        reason = should_stop()
        if ranks.any(reason is not None):
            save_checkpoint(state)
            raise StopRequested(reason or "another process of this run was asked to stop")

        # --- forward and backward over the micro batches
        started = time.perf_counter()
        step = state.step + 1
        result = _gradients(trainable, stage, data, objective, state, ranks=ranks, observer=observer)

        # --- clip, check, update
        if state.scaler is not None:
            state.scaler.unscale_(state.optimizer)
        grad_norm = clip_gradients(parameters, stage.max_grad_norm, ranks)
        can_rescale = state.scaler is not None and state.scaler.get_scale() > _SMALLEST_LOSS_SCALE
        if not (math.isfinite(result.loss) and (math.isfinite(grad_norm) or can_rescale)):
            raise _diverged(data, step, result, grad_norm, learning_rate)
        rate = learning_rate * learning_rate_share(stage, step, total_steps)
        set_learning_rate(state.optimizer, rate)
        if state.scaler is None:
            state.optimizer.step()
        else:
            state.scaler.step(state.optimizer)
            state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step = step
        state.trained_tokens += result.num_trained
        state.processed_tokens += result.num_tokens
        state.last_train_loss = result.loss
        state.last_train_accuracy = result.accuracy

        # --- tell, evaluate, save
        seconds = time.perf_counter() - started
        seconds_per_step = seconds if seconds_per_step == 0.0 else 0.9 * seconds_per_step + 0.1 * seconds
        valid = None
        if data.validation and (step == total_steps or _is_due(step, stage.evaluate_every_steps)):
            valid = evaluate(
                trainable,
                data.validation,
                micro_batch_size=state.micro_batch_size,
                make_objective=data.make_objective,
                ranks=ranks,
            )
        observer.on_step(
            StepMetrics(
                stage=data.label,
                step=step,
                total_steps=total_steps,
                train_loss=result.loss,
                train_mean_token_accuracy=result.accuracy,
                valid_loss=valid.loss if valid else None,
                valid_mean_token_accuracy=valid.mean_token_accuracy if valid else None,
                learning_rate=rate,
                grad_norm=grad_norm,
                trained_tokens=state.trained_tokens,
                processed_tokens=state.processed_tokens,
                tokens_per_second=result.num_tokens / seconds,
                seconds_left=seconds_per_step * (total_steps - step + steps_after),
                figures=result.figures,
                steps_before=steps_before,
                steps_after=steps_after,
            )
        )
        if valid is not None and _is_finished(stage, state, valid, step, save_best):
            text = f"stage {data.label}: stopped early after step {step}, {state.validations_without_gain} validations"
            best = f"{state.best.valid_loss:.4f} after step {state.best.step}" if state.best else "none"
            observer.on_event(TrainingEvent("info", f"{text} without gain (best valid_loss {best})", {"step": step}))
            break
        if step in data.epoch_ends:
            end_epoch(state)
        if step < total_steps and _is_due(step, checkpoint_every_steps):
            save_checkpoint(state)


def _gradients(
    trainable: Trainable,
    stage: Stage,
    data: StageData,
    objective: Objective,
    state: StageState,
    *,
    ranks: Ranks,
    observer: Observer,
) -> StepResult:
    """Of the next step. Halves the micro batch each time memory runs out; the sequences of the step stay."""
    step = state.step + 1
    while True:
        size = state.micro_batch_size
        assert size is not None
        seed_step(data.seed, step, ranks.rank)
        try:
            with noisy_embeddings(trainable.model, stage.neftune_alpha):
                return accumulate_gradients(
                    trainable,
                    objective,
                    data.steps[state.step],
                    micro_batch_size=size,
                    ranks=ranks,
                    scaler=state.scaler,
                )
        except MicroBatchTooLargeError as error:
            if size == 1:
                raise TrainingOutOfMemoryError(
                    f"stage {data.label} step {step}: out of memory with one sequence at a time; lower max_length, set "
                    "gradient_checkpointing, take a method with fewer trained weights, or free memory"
                ) from error
        state.micro_batch_size = size // 2
        text = f"stage {data.label} step {step}: out of memory with micro batches of {size}; going on at the same step"
        observer.on_event(
            TrainingEvent(
                "warn",
                f"{text} with {size // 2} and as many more of them, so that batch, order and loss stay the same",
                {"step": step, "micro_batch_size": size // 2},
            )
        )


def _diverged(
    data: StageData, step: int, result: StepResult, grad_norm: float, learning_rate: float
) -> TrainingDivergedError:
    suspects = result.faulty or [index for sequence in sequences_of(data.steps[step - 1]) for index in sequence]
    rows = [data.name_row(index) for index in suspects]
    shown = ", ".join(rows[:_SHOWN_ROWS]) + (f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else "")
    return TrainingDivergedError(
        f"stage {data.label} step {step}: loss {result.loss} and gradient norm {grad_norm} must be finite; look at the "
        f"rows of this step ({shown}), lower learning_rate (peak {learning_rate:g}) or lengthen the warm-up"
    )


def _is_finished(
    stage: Stage, state: StageState, valid: Evaluation, step: int, save_best: Callable[[Best], None]
) -> bool:
    """Take a validation into account; say whether the stage's patience is at its end."""
    needed = stage.early_stopping.min_improvement if stage.early_stopping is not None else 0.0
    if state.best is None or valid.loss < state.best.valid_loss - needed:
        state.best = Best(step, valid.loss)
        state.validations_without_gain = 0
        save_best(state.best)
    else:
        state.validations_without_gain += 1
    return stage.early_stopping is not None and state.validations_without_gain >= stage.early_stopping.patience


def evaluate(
    trainable: Trainable,
    examples: Sequence[Any],
    *,
    micro_batch_size: int,
    make_objective: Callable[[Sequence[Any]], Objective] = LanguageModelling,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Loss and accuracy over all units of ``examples``; leaves the model in training mode if it was.

    Takes smaller batches where memory runs out. With ``ranks`` every process evaluates its share.
    """
    ranks = ranks or Ranks()
    objective = make_objective(examples)
    was_training = trainable.model.training
    trainable.model.eval()
    by_length = sorted(range(len(examples)), key=lambda index: -objective.length(index))[ranks.rank :: ranks.size]
    passes = math.ceil(len(by_length) / micro_batch_size)
    num_empty_passes = ranks.most(passes) - passes if trainable.is_sharded else 0
    sums = torch.zeros(2, dtype=torch.float64)
    start = 0
    with torch.no_grad():
        while start < len(by_length):
            chosen = by_length[start : start + micro_batch_size]
            try:
                losses = objective.losses(trainable, [(index,) for index in chosen])
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or micro_batch_size == 1 or trainable.is_sharded:
                    raise
                micro_batch_size //= 2
                release_memory()
                continue
            sums += torch.tensor([float(losses.total), float(losses.hits)], dtype=torch.float64)
            start += len(chosen)
        for _ in range(num_empty_passes):
            run_empty_pass(trainable)
    ranks.add_up(sums)
    trainable.model.train(was_training)
    num_units = sum(objective.num_units(index) for index in range(len(examples)))
    loss, hits = (sums / num_units).tolist()
    return Evaluation(loss, hits)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
