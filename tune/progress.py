"""What a run tells its watchers, and how it is asked to stop. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from registry.errors import CapoError


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step, as seen after it."""

    stage: str
    """``<number from 1>-<kind>``, for example ``1-cpt``."""
    step: int
    """From 1, within the stage."""
    total_steps: int
    """Of the stage."""
    train_loss: float
    """Mean cross-entropy in nats over the step's trained tokens."""
    train_mean_token_accuracy: float
    """Share of the step's trained tokens that were the most likely one."""
    valid_loss: float | None
    """Set on steps after which the held-out rows were evaluated."""
    valid_mean_token_accuracy: float | None
    learning_rate: float
    grad_norm: float
    """L2 norm before clipping."""
    trained_tokens: int
    """Tokens that carried loss, since the run began, over all stages."""
    tokens_per_second: float
    """Tokens that went through the model, without padding, over this step's time."""
    seconds_left: float
    """For the rest of the run, at this stage's pace; validation and publication not counted."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the stage's objective measures besides, as means over the step."""
    processed_tokens: int = 0
    """Tokens of the examples that went through the model in training, prompts included, since the run began."""
    steps_before: int = 0
    """Done in earlier stages."""
    steps_after: int = 0
    """Planned for later stages."""

    @property
    def run_step(self) -> int:
        """From 1, within the run."""
        return self.steps_before + self.step

    @property
    def run_total_steps(self) -> int:
        return self.steps_before + self.total_steps + self.steps_after


@dataclass(frozen=True, slots=True)
class TrainingEvent:
    """Something a person may want to read: a choice, a count, a warning."""

    level: Literal["info", "warn"]
    message: str
    data: dict[str, float | int | str] = field(default_factory=dict)


class Observer(Protocol):
    """Told about everything, in order, from the training thread; a slow observer slows training."""

    def on_event(self, event: TrainingEvent) -> None: ...

    def on_step(self, metrics: StepMetrics) -> None: ...


class StopRequested(Exception):
    """The run was asked to stop and did, at a step boundary, with a checkpoint written. Not a fault."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TrainingDivergedError(CapoError):
    """Loss or gradient became infinite or no number. The weights are of no use."""

    default_code = "training_diverged"


class TrainingOutOfMemoryError(CapoError):
    """Not even one sequence at a time fits into memory. The same job would meet it again on this machine."""

    default_code = "out_of_memory"


class SilentObserver:
    """Hears everything and says nothing."""

    def on_event(self, event: TrainingEvent) -> None:
        del event

    def on_step(self, metrics: StepMetrics) -> None:
        del metrics


class FanOut:
    """Passes everything on to several observers, in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def on_event(self, event: TrainingEvent) -> None:
        for observer in self._observers:
            observer.on_event(event)

    def on_step(self, metrics: StepMetrics) -> None:
        for observer in self._observers:
            observer.on_step(metrics)
