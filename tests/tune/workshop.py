"""Where one test trains: data files, a registry, a way to run recipes on them, and what a run said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry import Artifact, Registry
from tune.progress import SilentObserver, StepMetrics, TrainingEvent
from tune.recipe_file import parse_recipe
from tune.session import TrainingResult, run


@dataclass
class Recorder(SilentObserver):
    steps: list[StepMetrics] = field(default_factory=list)
    events: list[TrainingEvent] = field(default_factory=list)

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def on_event(self, event: TrainingEvent) -> None:
        self.events.append(event)

    def said(self, text: str) -> bool:
        return any(text in event.message for event in self.events)


@dataclass
class Workshop:
    """Where one test trains: data files, a registry, and a way to run recipes on them."""

    root: Path
    base_dir: Path
    registry: Registry

    def recipe(self, **changes: Any) -> dict[str, Any]:
        return {"name": "colours", "base_model": str(self.base_dir), "stages": [self.sft()]} | changes

    def sft(self, **changes: Any) -> dict[str, Any]:
        base = {"kind": "sft", "data": [{"path": "chat.jsonl"}], "validation": {"share": 0.2}, "learning_rate": 1e-2}
        return base | {"epochs": 2} | changes

    def cpt(self, **changes: Any) -> dict[str, Any]:
        base = {"kind": "cpt", "data": [{"path": "text.jsonl"}], "validation": {"share": 0.2}, "learning_rate": 3e-3}
        return base | {"epochs": 2} | changes

    def run(
        self,
        recipe: dict[str, Any],
        work: str = "work",
        observer: Recorder | None = None,
        should_stop: Callable[[], str | None] = lambda: None,
        **more: Any,
    ) -> TrainingResult:
        return run(
            parse_recipe(recipe),
            registry=self.registry,
            work_dir=self.root / work,
            observer=observer or Recorder(),
            should_stop=should_stop,
            recipe_dir=self.root,
            **more,
        )


class StopAfter:
    """Asks for a stop at the step boundary after ``steps`` steps, once."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def __call__(self) -> str | None:
        self._left -= 1
        return "paused" if self._left == -1 else None


def weights_of(artifact: Artifact) -> bytes:
    return next(artifact.path.glob("*.safetensors")).read_bytes()
