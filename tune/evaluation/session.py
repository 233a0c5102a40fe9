"""Base against tuned, from files to figures and a report: after training, and for ``capo evaluate``."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import BaseModel, Registry
from registry.errors import InvalidRequestError
from tune.data.mask import Example
from tune.evaluation.benchmarks import check as check_benchmarks
from tune.evaluation.benchmarks import run_on_endpoint, run_on_model
from tune.evaluation.comparison import Measured, Rows, measure, side_by_side
from tune.evaluation.curves import CurvePoint
from tune.evaluation.libraries import import_libraries, libraries_of
from tune.evaluation.loading import load, locate
from tune.evaluation.promotion import Decision, Promotion
from tune.evaluation.report import Report
from tune.evaluation.rows import read_examples, rows_of_job
from tune.evaluation.settings import Evaluation
from tune.model import load_tokenizer, stop_token_ids


@dataclass(frozen=True, slots=True)
class Outcome:
    report: Report
    decision: Decision | None

    @property
    def is_promoted(self) -> bool:
        return self.decision is None or self.decision.is_promoted

    def metrics(self) -> dict[str, float]:
        """As the manifest names them: ``evaluation.<side>.<metric>``, and ``promotion.is_promoted`` as 0 or 1."""
        named = {
            f"evaluation.{side}.{metric}": value
            for side, figures in self.report.figures.items()
            for metric, value in figures.items()
        }
        return named if self.decision is None else named | {"promotion.is_promoted": float(self.decision.is_promoted)}

    def sentence(self) -> str:
        base, tuned = self.report.figures["base"], self.report.figures["tuned"]
        shown = [metric for metric in ("loss", "exact_match", "general_loss") if metric in base and metric in tuned]
        return "; ".join(f"{metric} {base[metric]:.4f} -> {tuned[metric]:.4f}" for metric in shown)


@dataclass(frozen=True, slots=True)
class Contest:
    """Two models and what they are judged by."""

    name: str
    base: BaseModel
    model_dir: Path
    adapter_dir: Path | None
    rows: Rows
    settings: Evaluation
    directory: Path
    """Where relative paths of the settings start."""


def judge(contest: Contest, *, promote_if: str | None = None, curve: Sequence[CurvePoint] = ()) -> Outcome:
    """Measure the base, then the tuned model; one of them is in memory at a time."""
    tokenizer = load_tokenizer(contest.base.path)
    stop_ids = stop_token_ids(contest.base.path, tokenizer)
    base = _measured(contest, contest.base.path, None, tokenizer, stop_ids)
    tuned = _measured(contest, contest.model_dir, contest.adapter_dir, tokenizer, stop_ids)
    figures = {"base": base.figures, "tuned": tuned.figures}
    decision = Promotion(promote_if).decide(**figures) if promote_if is not None else None
    report = Report(
        title=contest.name,
        base=contest.base.id,
        rows=f"Judged on {len(contest.rows.examples)} {contest.rows.source}.",
        figures=figures,
        answers=side_by_side(tokenizer, contest.rows, base, tuned, stop_ids),
        curve=curve,
        decision=decision,
    )
    return Outcome(report, decision)


def rows_for(settings: Evaluation, held_out: Sequence[Example], base_dir: Path, directory: Path) -> Rows:
    """The rows that the settings name, or else ``held_out``.

    Raises:
        InvalidRequestError: there are neither.
        InvalidDataError, NotFoundError: a file cannot be read.
    """
    tokenizer = load_tokenizer(base_dir)
    if settings.data is not None:
        examples: Sequence[Example] = read_examples(
            directory / settings.data, tokenizer, base_dir, max_rows=settings.max_rows
        )
        source = f"examples of {settings.data.name}"
    elif len(held_out):
        examples, source = held_out[: settings.max_rows], "held-out examples"
    else:
        raise InvalidRequestError(
            "evaluation has no rows to judge on: set evaluation.data, or validation in the last stage with chat rows",
            param="evaluation",
        )
    general: Sequence[Example] = []
    if settings.general is not None:
        general = read_examples(directory / settings.general, tokenizer, base_dir, max_rows=settings.max_rows)
    check_benchmarks(settings.benchmarks, directory)
    return Rows(examples, general, source)


def evaluate_reference(
    reference: str,
    settings: Evaluation,
    *,
    registry: Registry,
    directories: Sequence[Path],
    promote_if: str | None = None,
    base_model: str | None = None,
) -> Outcome:
    """An artifact of the registry against the base that it was made from.

    ``directories`` are where the data of its job may be; used where the settings name no rows.

    Raises:
        ModelNotFoundError, InvalidArtifactError: it or its base cannot be had.
        InvalidRequestError, InvalidDataError, NotFoundError: there are no rows, or bad ones, or libraries are missing.
    """
    import_libraries(libraries_of(settings))
    judged, artifact = locate(reference, registry, base_model)
    held_out: Sequence[Example] = []
    if settings.data is None:
        tokenizer = load_tokenizer(judged.base.path)
        held_out = rows_of_job(artifact.manifest, directories, tokenizer, judged.base.path).held_out
    rows = rows_for(settings, held_out, judged.base.path, Path())
    contest = Contest(judged.name, judged.base, judged.model_dir, judged.adapter_dir, rows, settings, Path())
    return judge(contest, promote_if=promote_if)


def evaluate_endpoint(
    url: str, models: Sequence[str], base_dir: Path, settings: Evaluation, *, api_key: str | None
) -> dict[str, dict[str, float]]:
    """Benchmarks of served models, by name. ``api_key``: of a service that asks for one."""
    benchmarks = settings.benchmarks
    return {model: run_on_endpoint(url, model, base_dir, benchmarks, Path(), api_key=api_key) for model in models}


def _measured(
    contest: Contest, model_dir: Path, adapter_dir: Path | None, tokenizer: Any, stop_ids: frozenset[int]
) -> Measured:
    settings = contest.settings
    model = load(model_dir, adapter_dir)
    measured = measure(
        model,
        tokenizer,
        contest.rows,
        stop_ids=stop_ids,
        max_tokens=settings.max_tokens,
        batch_size=settings.batch_size,
    )
    figures = run_on_model(model, tokenizer, settings.benchmarks, contest.directory, batch_size=settings.batch_size)
    del model
    gc.collect()  # the next model is loaded before anything else would ask for memory
    return Measured(measured.figures | figures, measured.answers)
