"""Carries what a run tells into the job's events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from tune.jobs.queue import WorkQueue
from tune.jobs.records import JobRecord, NewEvent
from tune.progress import StepMetrics, TrainingEvent

FLUSH_SECONDS = 0.5
"""Steps of a small model take milliseconds and a commit waits for the disk: steps are written in bunches."""


class JobObserver:
    """Writes events under the job's epoch; raises :class:`~registry.errors.ConflictError` once it is lost.

    The first step is written at once, so that a watcher sees the job move. So is every ``checkpoint_every_steps``-th,
    before its checkpoint is: a job that is killed after it goes on behind that step, and nobody would tell of it again.
    Steps that an attempt repeats were told of by the one before and are not told again: they have the same figures.
    """

    def __init__(
        self,
        queue: WorkQueue,
        job: JobRecord,
        *,
        checkpoint_every_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._job = job
        self._checkpoint_every_steps = checkpoint_every_steps
        self._clock = clock
        self._last_told_step = queue.last_told_step(job)
        self._pending: list[NewEvent] = []
        self._estimated_finish: int | None = None
        self._flushed_at = -math.inf
        self._has_stepped = False

    def on_event(self, event: TrainingEvent) -> None:
        self._pending.append(NewEvent(event.message, level=event.level, data=_finite(event.data) or None))
        self._flush()

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.run_step > self._last_told_step:
            self._pending.append(_metrics_event(metrics))
        self._estimated_finish = int(time.time() + max(0.0, metrics.seconds_left))
        every = self._checkpoint_every_steps
        is_kept = metrics.run_step == metrics.run_total_steps or (every is not None and metrics.step % every == 0)
        if is_kept or not self._has_stepped or self._clock() - self._flushed_at >= FLUSH_SECONDS:
            self._flush()
        self._has_stepped = True

    def close(self) -> None:
        if self._pending:
            self._flush()

    def _flush(self) -> None:
        self._queue.add_events(self._job, self._pending, estimated_finish=self._estimated_finish)
        self._pending.clear()
        self._flushed_at = self._clock()


def _metrics_event(metrics: StepMetrics) -> NewEvent:
    """OpenAI's names for its figures (fine_tuning/jobs/fine_tuning_job_checkpoint.py), ours for the rest.

    A validation here always covers all held-out rows, which OpenAI calls ``full_valid``.
    """
    text = f"Step {metrics.run_step}/{metrics.run_total_steps}: training loss={metrics.train_loss:.4f}"
    data: dict[str, Any] = {
        "step": metrics.run_step,
        "total_steps": metrics.run_total_steps,
        "stage": metrics.stage,
        "train_loss": metrics.train_loss,
        "train_mean_token_accuracy": metrics.train_mean_token_accuracy,
        "learning_rate": metrics.learning_rate,
        "grad_norm": metrics.grad_norm,
        "trained_tokens": metrics.processed_tokens,  # OpenAI's word for all that is paid for
        "tokens_per_second": metrics.tokens_per_second,
    }
    if metrics.valid_loss is not None:
        text += f", validation loss={metrics.valid_loss:.4f}"
        data |= {"valid_loss": metrics.valid_loss, "full_valid_loss": metrics.valid_loss}
    if metrics.valid_mean_token_accuracy is not None:
        data |= {
            "valid_mean_token_accuracy": metrics.valid_mean_token_accuracy,
            "full_valid_mean_token_accuracy": metrics.valid_mean_token_accuracy,
        }
    return NewEvent(text, kind="metrics", data=_finite(data))


def _finite(data: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity; they become ``None``."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in data.items()
    }
