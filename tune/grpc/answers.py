"""From records to protobuf. The enums' names are the records' words in capitals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from capo_proto.v1 import tuning_pb2 as pb
from tune.jobs.records import EventRecord, JobRecord


def job_message(job: JobRecord) -> pb.Job:
    """Protobuf takes ``None`` as not set."""
    numbers = {name: value for name, value in asdict(job.hyperparameters).items() if value is not None}
    return pb.Job(
        id=job.id,
        status=pb.JobStatus.Value(f"JOB_STATUS_{job.status.upper()}"),
        model=job.model,
        organization_id=job.tenant,
        training_file=job.training_file,
        validation_file=job.validation_file,
        suffix=job.suffix,
        seed=job.seed,
        method=pb.JobMethod.Value(f"JOB_METHOD_{job.method.upper()}"),
        hyperparameters=pb.Hyperparameters(**numbers),
        metadata=job.metadata,
        capo=json.dumps(dict(job.extensions)),
        created_at=job.created_at,
        finished_at=job.finished_at,
        estimated_finish=job.estimated_finish,
        fine_tuned_model=job.fine_tuned_model,
        revision=job.revision,
        trained_tokens=job.trained_tokens,
        result_files=job.result_files,
        error=None if job.error is None else pb.JobError(**asdict(job.error)),
        priority=job.priority,
        paused=job.paused,
        cancel_requested=job.cancel_requested,
        attempts=job.attempts,
        gpus=job.gpus,
        integrations=[pb.Integration(wandb=_wandb(given["wandb"])) for given in job.integrations],
    )


def _wandb(given: Mapping[str, Any]) -> pb.WandbIntegration:
    return pb.WandbIntegration(
        project=given["project"], name=given.get("name"), entity=given.get("entity"), tags=given.get("tags") or ()
    )


def event_message(event: EventRecord) -> pb.JobEvent:
    return pb.JobEvent(
        id=event.id,
        sequence=event.sequence,
        created_at=event.created_at,
        level=pb.JobEventLevel.Value(f"JOB_EVENT_LEVEL_{event.level.upper()}"),
        kind=pb.JobEventKind.Value(f"JOB_EVENT_KIND_{event.kind.upper()}"),
        message=event.message,
        data=None if event.data is None else json.dumps(dict(event.data)),
    )
