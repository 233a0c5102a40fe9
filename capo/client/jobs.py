"""Fine-tuning jobs as both clients make and show them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from capo.client.messages import as_json, made
from capo_proto.v1 import tuning_pb2 as pb


class JobMethod(StrEnum):
    SUPERVISED = "supervised"
    DPO = "dpo"


class JobStatus(StrEnum):
    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """``None`` in a request: the server chooses, and the job shows what."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    beta: float | None = None
    """Of DPO only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wandb:
    """Where Weights & Biases shows the job's figures."""

    project: str
    name: str | None = None
    entity: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What a job may be told beside its model and its file."""

    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    method: JobMethod | None = None
    hyperparameters: Hyperparameters | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    capo: Mapping[str, Any] | None = None
    """What OpenAI's fields cannot say: the object ``capo`` of the HTTP body."""
    wandb: Wandb | None = None
    idempotency_key: str | None = None
    """The same request with the same key makes one job, however often it is sent."""


@dataclass(frozen=True, slots=True)
class JobError:
    code: str
    message: str
    param: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """A fine-tuning job. Times are Unix seconds."""

    id: str
    status: JobStatus
    model: str
    organization_id: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int
    method: JobMethod
    hyperparameters: Hyperparameters
    metadata: Mapping[str, str]
    capo: Mapping[str, Any]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    """The name that calls the result, once the job has succeeded."""
    revision: str | None
    trained_tokens: int | None
    result_files: tuple[str, ...]
    error: JobError | None
    priority: int
    paused: bool
    cancel_requested: bool
    attempts: int
    gpus: int
    wandb: Wandb | None


@dataclass(frozen=True, slots=True)
class JobPage:
    """The newest first; ask for the next page with ``after=page.jobs[-1].id`` while ``has_more``."""

    jobs: tuple[Job, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class JobEvent:
    id: str
    sequence: int
    """1, 2, 3 … within the job, without gaps."""
    created_at: int
    level: str
    """info, warn or error."""
    kind: str
    """message, or metrics with the figures of a step in ``data``."""
    message: str
    data: Mapping[str, Any] | None


def create_job_request(model: str, training_file: str, options: JobOptions) -> pb.CreateJobRequest:
    """Protobuf takes ``None`` as not set."""
    numbers, wandb = options.hyperparameters, options.wandb
    return made(
        pb.CreateJobRequest,
        model=model,
        training_file=training_file,
        validation_file=options.validation_file,
        suffix=options.suffix,
        seed=options.seed,
        method=None if options.method is None else pb.JobMethod.Value(f"JOB_METHOD_{options.method.name}"),
        hyperparameters=None if numbers is None else made(pb.Hyperparameters, **_numbers(numbers)),
        metadata=options.metadata,
        capo=None if options.capo is None else as_json("capo", dict(options.capo)),
        integrations=[] if wandb is None else [pb.Integration(wandb=_wandb(wandb))],
        idempotency_key=options.idempotency_key,
    )


def job(message: pb.Job) -> Job:
    def given(name: str) -> Any:
        return getattr(message, name) if message.HasField(name) else None

    numbers, error = message.hyperparameters, message.error
    return Job(
        id=message.id,
        status=JobStatus[_word(pb.JobStatus.Name(message.status), "JOB_STATUS_").upper()],
        model=message.model,
        organization_id=message.organization_id,
        training_file=message.training_file,
        validation_file=given("validation_file"),
        suffix=given("suffix"),
        seed=message.seed,
        method=JobMethod[_word(pb.JobMethod.Name(message.method), "JOB_METHOD_").upper()],
        hyperparameters=Hyperparameters(
            n_epochs=numbers.n_epochs,
            batch_size=numbers.batch_size,
            learning_rate_multiplier=numbers.learning_rate_multiplier,
            beta=numbers.beta if numbers.HasField("beta") else None,
        ),
        metadata=dict(message.metadata),
        capo=json.loads(message.capo),
        created_at=message.created_at,
        finished_at=given("finished_at"),
        estimated_finish=given("estimated_finish"),
        fine_tuned_model=given("fine_tuned_model"),
        revision=given("revision"),
        trained_tokens=given("trained_tokens"),
        result_files=tuple(message.result_files),
        error=JobError(error.code, error.message, error.param if error.HasField("param") else None)
        if message.HasField("error")
        else None,
        priority=message.priority,
        paused=message.paused,
        cancel_requested=message.cancel_requested,
        attempts=message.attempts,
        gpus=message.gpus,
        wandb=next((_shown_wandb(given.wandb) for given in message.integrations if given.HasField("wandb")), None),
    )


def job_page(message: pb.ListJobsResponse) -> JobPage:
    return JobPage(tuple(job(given) for given in message.jobs), message.has_more)


def job_event(message: pb.JobEvent) -> JobEvent:
    return JobEvent(
        id=message.id,
        sequence=message.sequence,
        created_at=message.created_at,
        level=_word(pb.JobEventLevel.Name(message.level), "JOB_EVENT_LEVEL_"),
        kind=_word(pb.JobEventKind.Name(message.kind), "JOB_EVENT_KIND_"),
        message=message.message,
        data=json.loads(message.data) if message.HasField("data") else None,
    )


def _numbers(numbers: Hyperparameters) -> dict[str, Any]:
    return {
        "n_epochs": numbers.n_epochs,
        "batch_size": numbers.batch_size,
        "learning_rate_multiplier": numbers.learning_rate_multiplier,
        "beta": numbers.beta,
    }


def _wandb(wandb: Wandb) -> pb.WandbIntegration:
    return made(pb.WandbIntegration, project=wandb.project, name=wandb.name, entity=wandb.entity, tags=wandb.tags)


def _shown_wandb(message: pb.WandbIntegration) -> Wandb:
    return Wandb(
        project=message.project,
        name=message.name if message.HasField("name") else None,
        entity=message.entity if message.HasField("entity") else None,
        tags=tuple(message.tags),
    )


def _word(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()
