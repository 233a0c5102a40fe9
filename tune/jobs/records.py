"""What the job store keeps, as plain frozen records: files, jobs, events, and pages of them.

The records know neither SQL nor OpenAI's wire form; :mod:`tune.jobs.store` fills them and
:mod:`tune.jobs.wire` shows them. Times ending in ``_at`` are Unix seconds and are for people to read: no
decision depends on them, because clocks jump.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

JobStatus = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
"""OpenAI's six. Capo checks files at upload and again at creation, so a job of Capo's starts ``queued``."""

WAITING: tuple[JobStatus, ...] = ("validating_files", "queued")
OPEN: tuple[JobStatus, ...] = (*WAITING, "running")

FilePurpose = Literal["fine-tune", "fine-tune-results"]
RowFormat = Literal["chat", "preference", "text"]
JobMethod = Literal["supervised", "dpo"]
EventLevel = Literal["info", "warn", "error"]
EventKind = Literal["message", "metrics"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list; ``has_more`` says whether another follows its last record."""

    records: Sequence[T]
    has_more: bool


@dataclass(frozen=True, slots=True)
class FileRecord:
    id: str
    tenant: str
    """Whose it is; nobody else sees it."""
    filename: str
    """The client's label. It is shown and never used as a path."""
    purpose: FilePurpose
    size_bytes: int
    sha256: str
    rows: int | None
    """Rows of a training file; ``None`` for files that Capo wrote."""
    created_at: int
    row_format: RowFormat | None = None
    """Of a training file."""
    expires_at: int | None = None
    """From then on the file is as if deleted, except for jobs that have not ended."""


@dataclass(frozen=True, slots=True)
class JobError:
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """OpenAI's, with every ``"auto"`` already turned into a number."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    beta: float | None = None
    """Of method ``dpo``, and of it only."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job that passed every check and waits to be written."""

    model: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int
    hyperparameters: Hyperparameters
    metadata: Mapping[str, str] | None
    extensions: Mapping[str, Any]
    """The checked ``capo`` object of the request, as JSON."""
    method: JobMethod = "supervised"
    priority: int = 0
    gpus: int = 0
    integrations: Sequence[Mapping[str, Any]] = ()
    """OpenAI's objects, as they were asked for."""
    further_files: Sequence[str] = ()
    """That only the stages of ``extensions`` name."""
    trace_headers: Mapping[str, str] | None = None
    """W3C trace context of the request that made it; ``None``: it had none."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    id: str
    status: JobStatus
    model: str
    tenant: str
    """Whose it is; nobody else sees it."""
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int
    hyperparameters: Hyperparameters
    metadata: Mapping[str, str] | None
    extensions: Mapping[str, Any]
    reserved_name: str
    """The ``ft:`` name that the result will have; write-once, made with the job."""
    fine_tuned_model: str | None
    """:attr:`reserved_name` once the artifact is published, ``None`` before."""
    revision: str | None
    """``name@digest`` of the published artifact."""
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    trained_tokens: int | None
    """All that went through the model, as OpenAI counts ("billable tokens processed"); training itself
    (:mod:`tune.progress`) calls those ``processed_tokens``, and ``trained_tokens`` those that have a loss. ``None``
    until the job has succeeded."""
    result_files: Sequence[str]
    error: JobError | None
    owner: str | None
    """Which worker holds the job; see :mod:`tune.jobs.lease`."""
    epoch: int
    """Fencing number: grows with each claim, and a worker's write counts only under its own."""
    heartbeats: int
    """Grows with each sign of life of the owner under this epoch."""
    heartbeat_at: float | None
    lease_seconds: float
    """How long the owner's silence must last before another worker may take the job."""
    attempts: int
    cancel_requested: bool
    paused: bool
    """A paused job is ``queued``, and no worker takes it; a running one is on its way there."""
    priority: int
    """Of waiting jobs the highest goes first, and of equal ones the oldest."""
    method: JobMethod
    gpus: int
    """Only a worker that offers as many takes it."""
    integrations: Sequence[Mapping[str, Any]]
    trace_headers: Mapping[str, str] | None
    """W3C trace context of the request that made it, for the spans of its attempts."""


@dataclass(frozen=True, slots=True)
class NewEvent:
    message: str
    level: EventLevel = "info"
    kind: EventKind = "message"
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class EventRecord:
    id: str
    job_id: str
    sequence: int
    """1, 2, 3 … within the job, without gaps; the order of events."""
    level: EventLevel
    kind: EventKind
    message: str
    data: Mapping[str, Any] | None
    created_at: int
