"""The last acts of a run: judge what is about to be published, decide about its alias, and make its exports."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from registry import Artifact, Registry
from registry.errors import CapoError
from tune.data.mask import Example
from tune.evaluation.curves import CurveLog
from tune.evaluation.loading import Judged
from tune.evaluation.session import Contest, Outcome, judge, rows_for
from tune.exports.session import AnyExport, ExportRows, Source, export
from tune.exports.settings import AwqExport, GptqExport
from tune.preparation import Prepared
from tune.progress import Observer, TrainingEvent

logger = logging.getLogger(__name__)

Review: TypeAlias = Callable[[Path, bool], Outcome]
"""Judges the files in a directory (an adapter or not), and writes the report beside them."""


def reviewer(prepared: Prepared, recipe_dir: Path, curve: CurveLog, watcher: Observer) -> Review | None:
    """What judges the result, ``None`` where the recipe asks for no evaluation. Reads all rows now, so that their
    faults surface before any training.

    Raises:
        InvalidRequestError, InvalidDataError, NotFoundError: the recipe's evaluation cannot work.
    """
    settings = prepared.recipe.evaluation
    if settings is None:
        return None
    rows = rows_for(settings, _held_out(prepared), prepared.base.path, recipe_dir)

    def review(directory: Path, is_adapter: bool) -> Outcome:
        contest = Contest(
            name=prepared.recipe.name,
            base=prepared.base,
            model_dir=prepared.base.path if is_adapter else directory,
            adapter_dir=directory if is_adapter else None,
            rows=rows,
            settings=settings,
            directory=recipe_dir,
        )
        outcome = judge(contest, promote_if=prepared.recipe.promote_if, curve=curve.points())
        outcome.report.write(directory)
        watcher.on_event(TrainingEvent("info", f"evaluation: {outcome.sentence()}", {**outcome.metrics()}))
        if outcome.decision is not None:
            level: Literal["info", "warn"] = "info" if outcome.decision.is_promoted else "warn"
            watcher.on_event(TrainingEvent(level, outcome.decision.sentence(), {**outcome.decision.figures}))
        return outcome

    return review


def make_exports(prepared: Prepared, artifact: Artifact, registry: Registry, watcher: Observer) -> list[Artifact]:
    """Every export that the recipe asks for. One that fails is told and left out: the model it is of is published."""
    base = prepared.base
    is_adapter = artifact.manifest.kind == "lora"
    model_dir, adapter_dir = (base.path, artifact.path) if is_adapter else (artifact.path, None)
    source = Source(Judged(artifact.revision, base, model_dir, adapter_dir), artifact)
    made = []
    for settings in prepared.recipe.exports:
        assert not isinstance(settings, AwqExport), "no record of one can be made"
        try:
            rows = _export_rows(prepared, settings)
            made.append(export(source, settings, rows, registry=registry, watcher=watcher))
        except CapoError as error:
            watcher.on_event(TrainingEvent("warn", f"export {settings.kind} failed: {error.message}"))
        except Exception as error:  # out of memory is none of Capo's, and neither is a library's bug
            logger.exception("export %s of %s failed", settings.kind, artifact.revision)
            reason = f"{type(error).__name__}; the log of the training has more"
            watcher.on_event(TrainingEvent("warn", f"export {settings.kind} failed: {reason}"))
    return made


def _export_rows(prepared: Prepared, settings: AnyExport) -> ExportRows:
    calibration_rows = settings.calibration_rows if isinstance(settings, GptqExport) else 0
    held_out, trained = _held_out(prepared), _trained(prepared)
    note = "held-out rows" if len(held_out) else "training rows, as the recipe holds none out"
    judged_on = (held_out if len(held_out) else trained)[: settings.max_rows]
    return ExportRows(trained[:calibration_rows], judged_on, note)


def _held_out(prepared: Prepared) -> Sequence[Example]:
    """Validation rows of the last stage that has any and is not of pairs."""
    for ready in reversed(prepared.stages):
        if ready.stage.kind != "dpo" and len(ready.data.validation):
            return ready.data.validation
    return []


def _trained(prepared: Prepared) -> Sequence[Example]:
    for ready in reversed(prepared.stages):
        if ready.stage.kind != "dpo":
            return ready.data.examples
    return []
