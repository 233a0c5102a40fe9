"""The checkpoints of a job as OpenAI lists them: read from the registry, where training put them.

So nothing can disagree: what is listed can be called, and what was deleted is not listed. The last step is the job's
result itself and stands in the list under that name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from registry import Artifact, FineTunedName, Registry, parse_reference
from registry.errors import ModelNotFoundError
from tune.jobs.records import JobRecord, Page
from tune.jobs.rows import unknown_cursor

METRICS = (
    "train_loss",
    "train_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    id: str
    job_id: str
    model: str
    step: int
    """Of the run."""
    metrics: Mapping[str, float]
    """Of :data:`METRICS`, those that were measured."""
    created_at: int


def checkpoints_of(job: JobRecord, registry: Registry, *, after: str | None, limit: int) -> Page[CheckpointRecord]:
    """Newest first. Reads the registry's disk.

    Raises:
        InvalidRequestError: ``after`` is none of them.
    """
    names = [job.reserved_name, *(alias.alias for alias in reversed(registry.checkpoints(job.reserved_name)))]
    found = [record for name in names if (record := _record(job, name, registry)) is not None]
    if after is not None:
        ids = [record.id for record in found]
        if after not in ids:
            raise unknown_cursor(after)
        found = found[ids.index(after) + 1 :]
    return Page(found[:limit], len(found) > limit)


def _record(job: JobRecord, name: str, registry: Registry) -> CheckpointRecord | None:
    try:
        artifact = registry.resolve(name)
    except ModelNotFoundError:
        return None  # not published yet, or deleted
    manifest = artifact.manifest
    parsed = parse_reference(name)
    step = parsed.checkpoint_step if isinstance(parsed, FineTunedName) else None
    metrics: Mapping[str, float] = manifest.metrics
    if step is None:
        step, metrics = int(manifest.metrics.get("steps", 0)), _of_result(artifact)
    return CheckpointRecord(
        # Found again at every look, and by nobody who does not know the job.
        id="ftckpt_" + hashlib.sha256(f"{job.id} {name}".encode()).hexdigest()[:24],
        job_id=job.id,
        model=name,
        step=step,
        metrics={key: metrics[key] for key in METRICS if key in metrics},
        created_at=manifest.created_at,
    )


def _of_result(artifact: Artifact) -> Mapping[str, float]:
    """The figures of the last stage, which the manifest of a result names with the stage's label."""
    stages = (artifact.manifest.recipe or {}).get("stages")
    if not isinstance(stages, list) or not stages or not isinstance(stages[-1], dict):
        return {}
    label = f"{len(stages)}-{stages[-1].get('kind')}"
    metrics = artifact.manifest.metrics
    return {key: metrics[name] for key in METRICS if (name := f"{label}.{key.removeprefix('full_')}") in metrics}
