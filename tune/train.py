"""The training loop of one stage, on plain torch: flat, in sections, one step after another.

The loss of an optimizer step is the sum over its trained tokens divided by their number, over all micro
batches together; so how a step is cut into micro batches does not change it (the fault of
huggingface/transformers#34191). AdamW: https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tune.data.batches import StepPlan
from tune.data.mask import Example
from tune.forward import collate, token_losses
from tune.model import Trainable
from tune.progress import Observer, StepMetrics, StopRequested, TrainingDivergedError
from tune.recipe import Stage


@dataclass(frozen=True, slots=True)
class StageData:
    """What one stage trains on, ready to run."""

    label: str
    """``StepMetrics.stage``."""
    examples: Sequence[Example]
    steps: Sequence[StepPlan]
    validation: Sequence[Example]
    """May be empty."""


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


@dataclass(slots=True)
class StageState:
    """Where a stage stands; what a checkpoint must hold beside the weights."""

    optimizer: torch.optim.Optimizer
    step: int
    """Steps done."""
    trained_tokens: int
    """Since the run began, earlier stages included."""
    last_train_loss: float = math.nan


def make_optimizer(trainable: Trainable, stage: Stage, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without decay on vectors (norms, biases), fused where torch has it (CPU and CUDA)."""
    parameters = [parameter for _, parameter in trainable.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(0.9, stage.adam_beta2),
        fused=True,
    )


def learning_rate_share(stage: Stage, step: int, total_steps: int) -> float:
    """Share of the peak rate for ``step`` (from 1): linear warm-up, then the scheduler's curve to its final share."""
    warmup_steps = round(stage.warmup_share * total_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    if stage.scheduler == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    curve = 0.5 * (1.0 + math.cos(math.pi * progress)) if stage.scheduler == "cosine" else 1.0 - progress
    return stage.final_learning_rate_share + (1.0 - stage.final_learning_rate_share) * curve


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
    checkpoint_every_steps: int | None,
) -> None:
    """Run the stage from ``state.step`` to its end, mutating model and ``state``.

    Raises:
        TrainingDivergedError: names the step.
        StopRequested: ``should_stop`` gave a reason; a checkpoint was saved.
    """
    parameters = [parameter for _, parameter in trainable.parameters()]
    total_steps = len(data.steps)
    seconds_per_step = 0.0
    trainable.model.train()
    while state.step < total_steps:
        # --- stop at the step boundary
        reason = should_stop()
        if reason is not None:
            save_checkpoint(state)
            raise StopRequested(reason)

        # --- forward and backward over the micro batches
        started = time.perf_counter()
        step = state.step + 1
        batches = [collate(data.examples, micro) for micro in data.steps[state.step].micro_batches]
        step_targets = sum(int((batch.targets >= 0).sum()) for batch in batches)
        loss_sum = torch.zeros((), device=trainable.device)
        hits = torch.zeros((), device=trainable.device)
        for batch in batches:
            losses, batch_hits = token_losses(trainable, batch)
            (losses.sum() / step_targets).backward()
            loss_sum += losses.detach().sum()
            hits += batch_hits.sum()
        loss = float(loss_sum) / step_targets

        # --- clip, check, update
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingDivergedError(
                f"stage {data.label} step {step}: loss {loss} and gradient norm {grad_norm} must be finite; lower "
                f"learning_rate (peak {learning_rate:g}) or lengthen warmup_share, and look at the rows of this step"
            )
        rate = learning_rate * learning_rate_share(stage, step, total_steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step = step
        state.trained_tokens += step_targets
        state.last_train_loss = loss

        # --- tell, evaluate, save
        seconds = time.perf_counter() - started
        seconds_per_step = seconds if seconds_per_step == 0.0 else 0.9 * seconds_per_step + 0.1 * seconds
        valid = None
        if data.validation and (step == total_steps or _is_due(step, stage.evaluate_every_steps)):
            valid = evaluate(trainable, data.validation, micro_batch_size=_evaluation_batch(data))
        observer.on_step(
            StepMetrics(
                stage=data.label,
                step=step,
                total_steps=total_steps,
                train_loss=loss,
                train_mean_token_accuracy=float(hits) / step_targets,
                valid_loss=valid.loss if valid else None,
                valid_mean_token_accuracy=valid.mean_token_accuracy if valid else None,
                learning_rate=rate,
                grad_norm=grad_norm,
                trained_tokens=state.trained_tokens,
                tokens_per_second=sum(batch.num_tokens for batch in batches) / seconds,
                seconds_left=seconds_per_step * (total_steps - step),
            )
        )
        if step < total_steps and _is_due(step, checkpoint_every_steps):
            save_checkpoint(state)


def evaluate(trainable: Trainable, examples: Sequence[Example], *, micro_batch_size: int) -> Evaluation:
    """Loss and accuracy over all trained tokens of ``examples``; leaves the model in training mode if it was."""
    was_training = trainable.model.training
    trainable.model.eval()
    by_length = sorted(range(len(examples)), key=lambda index: -len(examples[index].token_ids))
    loss_sum = hit_sum = num_targets = 0.0
    with torch.no_grad():
        for start in range(0, len(by_length), micro_batch_size):
            batch = collate(examples, [(index,) for index in by_length[start : start + micro_batch_size]])
            losses, hits = token_losses(trainable, batch)
            loss_sum += float(losses.double().sum())
            hit_sum += float(hits.sum())
            num_targets += len(losses)
    trainable.model.train(was_training)
    return Evaluation(loss_sum / num_targets, hit_sum / num_targets)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _evaluation_batch(data: StageData) -> int:
    """As many sequences as training has in one forward pass: what fitted in memory there fits here."""
    return max(len(micro) for step in data.steps for micro in step.micro_batches)
