"""Observers for people: a progress bar in the terminal, and TensorBoard files."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tune.progress import StepMetrics, TrainingEvent


class ProgressBar:
    """One bar for each stage, with loss, speed and time left; events are printed above it. Use as a context."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}
        self._valid_loss = ""

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_event(self, event: TrainingEvent) -> None:
        style = "yellow" if event.level == "warn" else "dim"
        self._progress.console.print(
            event.message, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True
        )

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.stage not in self._tasks:
            task = self._progress.add_task(metrics.stage, total=metrics.total_steps, figures="")
            self._tasks[metrics.stage] = task
            self._valid_loss = ""
        if metrics.valid_loss is not None:
            self._valid_loss = f" valid {metrics.valid_loss:.3f}"
        speed = f"{metrics.tokens_per_second:,.0f} tokens/s"
        left = timedelta(seconds=math.ceil(metrics.seconds_left))
        self._progress.update(
            self._tasks[metrics.stage],
            completed=metrics.step,
            figures=f"loss {metrics.train_loss:.3f}{self._valid_loss} · {speed} · {left} left",
        )


def scalars_of(metrics: StepMetrics) -> dict[str, float]:
    """The figures of a step as trackers name them: ``<stage>/<figure>``; those not measured are left out."""
    scalars = {
        "train_loss": metrics.train_loss,
        "train_mean_token_accuracy": metrics.train_mean_token_accuracy,
        "valid_loss": metrics.valid_loss,
        "valid_mean_token_accuracy": metrics.valid_mean_token_accuracy,
        "learning_rate": metrics.learning_rate,
        "grad_norm": metrics.grad_norm,
        "tokens_per_second": metrics.tokens_per_second,
        **metrics.figures,
    }
    return {f"{metrics.stage}/{name}": value for name, value in scalars.items() if value is not None}


class TensorBoardLog:
    """Writes scalars below ``directory``, one tag group for each stage. Use as a context.

    A resumed run writes into the same directory; steps count from where the stage began, so curves continue.
    """

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # more than a second; only runs that train pay for it

        self._writer = SummaryWriter(log_dir=str(directory), flush_secs=10)

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def on_event(self, event: TrainingEvent) -> None:
        if event.level == "warn":
            self._writer.add_text("warnings", event.message)

    def on_step(self, metrics: StepMetrics) -> None:
        for name, value in scalars_of(metrics).items():
            self._writer.add_scalar(name, value, metrics.step)
