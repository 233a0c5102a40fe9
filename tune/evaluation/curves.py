"""The loss curves of a run, kept in a file so that a resumed run has them whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tune.progress import StepMetrics, TrainingEvent


@dataclass(frozen=True, slots=True)
class CurvePoint:
    stage: str
    step: int
    train_loss: float
    valid_loss: float | None


class CurveLog:
    """An observer that appends one line for each step. A step that is repeated after a crash counts once, the last."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_event(self, event: TrainingEvent) -> None:
        del event

    def on_step(self, metrics: StepMetrics) -> None:
        point = CurvePoint(metrics.stage, metrics.step, metrics.train_loss, metrics.valid_loss)
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(point)) + "\n")

    def points(self) -> list[CurvePoint]:
        """In order of stages and steps. A last line that a crash cut short is left out."""
        if not self._path.is_file():
            return []
        latest: dict[tuple[str, int], CurvePoint] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                point = CurvePoint(**json.loads(line))
            except ValueError:
                continue
            latest[point.stage, point.step] = point
        return [latest[key] for key in sorted(latest, key=_place)]


def _place(key: tuple[str, int]) -> tuple[int, int]:
    """Stages are labelled ``<number>-<kind>``."""
    stage, step = key
    return int(stage.partition("-")[0]), step
