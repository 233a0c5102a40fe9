"""One export from reference to published artifact: make the bytes, verify them against the original, publish.

    source = locate_source("support", registry)
    artifact = export(source, MergeExport(), registry=registry, directories=[Path()])

The original is always the thing itself in float32: an adapter beside its base's layers, or the tuned model. So what a
merge before a quantisation loses counts too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from registry import Artifact, LoraShape, ManifestDraft, Registry, fingerprint, locate_base_model
from registry.errors import (
    InvalidArtifactError,
    InvalidNameError,
    InvalidRequestError,
    ModelNotFoundError,
    StorageError,
)
from tune.data.mask import Example
from tune.evaluation.gptq_weights import quantization_of
from tune.evaluation.loading import Judged, load, locate
from tune.evaluation.report import Report
from tune.evaluation.rows import read_examples, rows_of_job
from tune.evaluation.scoring import distance
from tune.exports.gptq import choose_group_size, quantize
from tune.exports.lora import extract
from tune.exports.merge import merge
from tune.exports.settings import GptqExport, LoraExport, MergeExport, choose_thresholds
from tune.exports.verification import Verdict, judge
from tune.model import load_tokenizer
from tune.progress import Observer, SilentObserver, TrainingEvent

_BATCH_SIZE = 8
AnyExport = MergeExport | GptqExport | LoraExport


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported."""

    judged: Judged
    artifact: Artifact | None
    """``None``: a base model itself."""

    @property
    def name(self) -> str:
        return self.artifact.name if self.artifact is not None else self.judged.base.id.partition("@")[0]


@dataclass(frozen=True, slots=True)
class ExportRows:
    calibration: Sequence[Example]
    held_out: Sequence[Example]
    note: str


@dataclass(frozen=True, slots=True)
class _Made:
    """An export on disk, not yet verified."""

    kind: Literal["lora", "merged", "gptq"]
    dtype: str
    notes: tuple[str, ...]
    lora: LoraShape | None = None
    quantized_from: str | None = None
    figures: Mapping[str, float] | None = None


def locate_source(reference: str, registry: Registry, base_model: str | None = None) -> Source:
    """An artifact by revision or alias, or else a base model. ``base_model``: where the artifact's base is, if its id
    does not say.

    Raises:
        ModelNotFoundError: it is neither.
    """
    try:
        registry.resolve(reference)
    except (ModelNotFoundError, InvalidNameError):
        base = locate_base_model(reference, registry)
        return Source(Judged(base.id, base, base.path, None), None)
    return Source(*locate(reference, registry, base_model))


def rows_for(
    source: Source, *, data: Path | None, directories: Sequence[Path], max_rows: int, calibration_rows: int = 0
) -> ExportRows:
    """Held-out rows of the source's own job, and training rows to calibrate on; or both out of ``data``.

    Raises:
        InvalidRequestError, NotFoundError: the job's rows cannot be had, and ``data`` is not given.
    """
    base_dir = source.judged.base.path
    tokenizer = load_tokenizer(base_dir)
    if data is not None:
        read = read_examples(data, tokenizer, base_dir, max_rows=max_rows + calibration_rows)
        held_out = read[:max_rows] if len(read) > max_rows else read
        rest = read[len(held_out) :]
        note = f"{len(held_out)} rows of {data.name}" + ("" if rest or not calibration_rows else ", calibrated on too")
        return ExportRows((rest or read)[:calibration_rows], held_out, note)
    if source.artifact is None:
        raise InvalidRequestError(
            f"{source.judged.name} is a base model, so there are no rows it was tuned on; name rows with --data FILE",
            param="data",
        )
    rows = rows_of_job(source.artifact.manifest, directories, tokenizer, base_dir)
    calibration = rows.trained[:calibration_rows]
    if len(rows.held_out):
        return ExportRows(calibration, rows.held_out[:max_rows], "held-out rows of its own job")
    return ExportRows(calibration, rows.trained[:max_rows], "rows it was trained on, as its recipe held none out")


def export(
    source: Source, settings: AnyExport, rows: ExportRows, *, registry: Registry, watcher: Observer | None = None
) -> Artifact:
    """Make, verify and publish. Blocks; both models are in memory while they are compared.

    Raises:
        InvalidRequestError, InvalidArtifactError: this export cannot be made of this source, or it is too far from it.
        StorageError: the disk refused.
    """
    watcher = watcher or SilentObserver()
    with registry.stage() as directory:
        try:
            made = _make(source, settings, rows, directory, registry)
        except OSError as error:
            raise StorageError(f"cannot write the export of {source.judged.name}: {error}; free some space") from error
        for note in made.notes:
            watcher.on_event(TrainingEvent("info", f"export {settings.kind}: {note}"))
        verdict, reason = _verified(source, settings, made, rows, directory)
        name = settings.name or f"{source.name}-{_suffix(settings)}"
        measured = verdict.distance.figures()
        watcher.on_event(
            TrainingEvent("info", f"export {settings.kind}: {_told(measured)} ({rows.note})", {**measured})
        )
        verdict.require(f"The export {name!r} of {source.judged.name}")
        _report(source, name, made, rows, verdict, reason).write(directory)
        artifact = registry.publish(directory, _draft(source, name, made, verdict))
    watcher.on_event(TrainingEvent("info", f"published {artifact.revision}", {"revision": artifact.revision}))
    return artifact


def _make(source: Source, settings: AnyExport, rows: ExportRows, directory: Path, registry: Registry) -> _Made:
    judged = source.judged
    if quantization_of(judged.model_dir) is not None:
        raise InvalidArtifactError(
            f"{judged.name} is quantised; nothing is exported from it. Export from the model it was made from.",
            code="already_quantized",
        )
    if isinstance(settings, MergeExport):
        if judged.adapter_dir is None:
            raise InvalidRequestError(f"{judged.name} has whole weights already; there is no adapter to merge")
        return _merged(judged, judged.adapter_dir, directory, settings.dtype)
    if isinstance(settings, GptqExport):
        # Not in /tmp: whole models may not fit there, and what a killed export leaves would stay.
        with registry.stage() as scratch:
            return _quantized(judged, settings, rows, directory, scratch)
    if source.artifact is None or judged.adapter_dir is not None:
        raise InvalidRequestError(f"{judged.name} is no tuned model with whole weights; extract an adapter from one")
    shape, extraction = extract(
        judged.base.path, judged.model_dir, directory, base_id=judged.base.id, rank=settings.rank
    )
    errors = {f"extraction.relative_error.{layer}": error for layer, error in extraction.relative_errors.items()}
    whole = {
        "extraction.relative_error": extraction.relative_error,
        "extraction.share_outside": extraction.share_outside,
    }
    told = f"rank {settings.rank} leaves out {extraction.relative_error:.1%} of the change (Frobenius norm)"
    return _Made("lora", "float32", (told,), lora=shape, figures=whole | errors)


def _merged(judged: Judged, adapter_dir: Path, directory: Path, dtype: str) -> _Made:
    notes = merge(judged.base.path, adapter_dir, directory, dtype=dtype)
    told = [f"{notes.num_updated} weights of {judged.base.id} updated, in that base's original precision"]
    if notes.is_untied:
        told.append("the adapter changes one use of the tied embeddings, so the two were separated")
    return _Made("merged", notes.dtype, tuple(told))


def _quantized(judged: Judged, settings: GptqExport, rows: ExportRows, directory: Path, scratch: Path) -> _Made:
    whole = judged.model_dir
    notes: list[str] = []
    if judged.adapter_dir is not None:
        whole = scratch / "merged"
        whole.mkdir()
        notes += _merged(judged, judged.adapter_dir, whole, "base").notes
    group_size, reason = choose_group_size(whole, settings.group_size)
    notes.append(f"{settings.bits} bits in groups of {group_size} ({reason})")
    notes.append(f"calibrated on {len(rows.calibration)} rows")
    quantize(whole, rows.calibration, directory, settings, group_size=group_size, scratch=scratch)
    return _Made("gptq", f"int{settings.bits}", tuple(notes), quantized_from=fingerprint(whole))


def _verified(
    source: Source, settings: AnyExport, made: _Made, rows: ExportRows, directory: Path
) -> tuple[Verdict, str]:
    judged = source.judged
    original = load(judged.model_dir, judged.adapter_dir)
    candidate = load(judged.base.path, directory) if made.kind == "lora" else load(directory)
    thresholds, reason = choose_thresholds(settings, made.dtype)
    return judge(distance(original, candidate, rows.held_out, batch_size=_BATCH_SIZE), thresholds), reason


def _draft(source: Source, name: str, made: _Made, verdict: Verdict) -> ManifestDraft:
    manifest = source.artifact.manifest if source.artifact is not None else None
    figures = {f"verification.{metric}": value for metric, value in verdict.distance.figures().items()}
    figures |= made.figures or {}
    parent = source.artifact.revision if source.artifact is not None else source.judged.base.id
    return ManifestDraft(
        kind=made.kind,
        name=name,
        base_model=manifest.base_model if manifest is not None else source.judged.base.identity,
        lora=made.lora,
        dtype=made.dtype,
        recipe=manifest.recipe if manifest is not None else None,
        data=manifest.data if manifest is not None else [],
        seed=manifest.seed if manifest is not None else None,
        library_versions=manifest.library_versions if manifest is not None else {},
        parents=[parent] if "@" in parent else [],
        quantized_from=made.quantized_from,
        metrics={metric: value for metric, value in figures.items() if math.isfinite(value)},
    )


def _report(source: Source, name: str, made: _Made, rows: ExportRows, verdict: Verdict, reason: str) -> Report:
    limits = {key: value for key, value in verdict.thresholds.model_dump().items() if value is not None}
    columns = {"measured": verdict.distance.figures(), "threshold": _by_metric(limits)}
    if made.figures:
        columns["extraction"] = dict(made.figures)
    return Report(
        title=f"{name}: {made.kind} export of {source.judged.name}",
        base=source.judged.base.id,
        rows=f"Compared on {rows.note}; thresholds: {reason}.",
        figures=columns,
        notes=made.notes,
    )


def _by_metric(limits: Mapping[str, float]) -> dict[str, float]:
    """Thresholds beside the figures that they bound."""
    return {name.removeprefix("max_").removeprefix("min_"): limit for name, limit in limits.items()}


def _suffix(settings: AnyExport) -> str:
    if isinstance(settings, GptqExport):
        return f"gptq{settings.bits}"
    return "merged" if isinstance(settings, MergeExport) else "lora"


def _told(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
