"""Records as OpenAI's objects: the fields and types of ``openai.types.fine_tuning`` and ``file_object``.

Whatever OpenAI has no word for stands in one extra object ``capo``, which its SDK keeps and ignores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from tune.jobs.checkpoints import CheckpointRecord
from tune.jobs.records import EventRecord, FileRecord, JobRecord, Page

Record = TypeVar("Record")
JsonObject = dict[str, Any]


def file_object(file: FileRecord) -> JsonObject:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",  # a file is visible only after its check
        "status_details": None,
    }


def deleted_file_object(file_id: str) -> JsonObject:
    return {"id": file_id, "object": "file", "deleted": True}


def job_object(job: JobRecord) -> JsonObject:
    numbers = {name: value for name, value in asdict(job.hyperparameters).items() if value is not None}
    shared = {name: value for name, value in numbers.items() if name != "beta"}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.tenant,
        "status": job.status,
        "error": None if job.error is None else asdict(job.error),
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": list(job.result_files),
        "seed": job.seed,
        "trained_tokens": job.trained_tokens,
        "hyperparameters": shared,
        "method": {"type": job.method, job.method: {"hyperparameters": numbers}},
        "integrations": [dict(integration) for integration in job.integrations],
        "metadata": None if job.metadata is None else dict(job.metadata),
        "capo": {
            **job.extensions,
            "suffix": job.suffix,
            "revision": job.revision,
            "attempts": job.attempts,
            "cancel_requested": job.cancel_requested,
            "paused": job.paused,
            "priority": job.priority,
            "gpus": job.gpus,
        },
    }


def checkpoint_object(checkpoint: CheckpointRecord) -> JsonObject:
    """openai/types/fine_tuning/jobs/fine_tuning_job_checkpoint.py. A validation here always covers all rows."""
    metrics = checkpoint.metrics
    shown = {"step": float(checkpoint.step), **metrics}
    for name in ("valid_loss", "valid_mean_token_accuracy"):
        if f"full_{name}" in metrics:
            shown[name] = metrics[f"full_{name}"]
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.model,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": shown,
    }


def event_object(event: EventRecord) -> JsonObject:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.kind,
        "data": None if event.data is None else dict(event.data),
    }


def list_object(page: Page[Record], show: Callable[[Record], JsonObject]) -> JsonObject:
    """A cursor page. ``first_id`` and ``last_id`` are ``None`` on an empty one."""
    data = [show(record) for record in page.records]
    return {
        "object": "list",
        "data": data,
        "has_more": page.has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
