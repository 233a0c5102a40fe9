"""What a job leaves behind beside its model: the result file, its metrics as CSV; and which exports it does not."""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from registry import Artifact, Registry
from registry.errors import ModelNotFoundError
from tune.jobs.convert import parse_extension
from tune.jobs.files import FileStorage
from tune.jobs.records import FileRecord, JobRecord
from tune.jobs.rows import new_id
from tune.jobs.store import JobStore

COLUMNS = (
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "train_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
"""The first five are the columns of OpenAI's result files, the others its newer checkpoint metrics
(openai/types/fine_tuning/jobs/fine_tuning_job_checkpoint.py)."""

_KIND_OF_EXPORT = {"merged": "merge"}
"""Where a recipe's word for an export is not the kind of the artifact that it makes."""


def store_metrics_table(store: JobStore, storage: FileStorage, job: JobRecord) -> FileRecord | None:
    """Write the table's bytes; ``None`` if no step was ever reported. The record is the caller's to enter."""
    rows = _metrics(store, job.id)
    if not rows:
        return None
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with storage.receive() as upload:
        upload.write(text.getvalue().encode())
        record = FileRecord(
            id=new_id("file-"),
            tenant=job.tenant,
            filename=f"{job.id}-metrics.csv",
            purpose="fine-tune-results",
            size_bytes=upload.size_bytes,
            sha256=upload.sha256,
            rows=None,
            created_at=int(time.time()),
        )
        upload.keep(record.id)
    return record


def published_result(job: JobRecord, registry: Registry) -> Artifact | None:
    """What stands under the job's name, if the job made it. Reads the registry's disk."""
    try:
        artifact = registry.resolve(job.reserved_name)
    except ModelNotFoundError:
        return None
    return artifact if artifact.manifest.job_id == job.id else None


def missing_exports(job: JobRecord, artifact: Artifact, registry: Registry) -> list[str]:
    """Kinds of exports that the job asked for and that nobody made of its artifact. Reads the registry's disk."""
    asked = [str(settings.get("kind")) for settings in parse_extension(job.extensions).exports or []]
    if not asked:
        return []
    made = Counter(
        _KIND_OF_EXPORT.get(found.manifest.kind, found.manifest.kind)
        for found in registry.artifacts()
        if artifact.revision in found.manifest.parents
    )
    return sorted((Counter(asked) - made).elements())


def _metrics(store: JobStore, job_id: str) -> list[dict[str, Any]]:
    """One row per step. Older Capos told of a step again when it was repeated after a crash: there the last counts."""
    by_step: dict[int, dict[str, Any]] = {}
    sequence = 0
    while events := store.events_since(job_id, sequence):
        sequence = events[-1].sequence
        for event in events:
            if event.kind == "metrics" and event.data is not None:
                by_step[int(event.data["step"])] = _row(event.data)
    return [by_step[step] for step in sorted(by_step)]


def _row(data: Mapping[str, Any]) -> dict[str, Any]:
    row = {column: data.get(column) for column in COLUMNS}
    return row | {"train_accuracy": data.get("train_mean_token_accuracy")}
