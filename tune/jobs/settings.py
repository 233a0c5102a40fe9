"""What a worker process must be told; plain values only, because they cross a process border."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STOP_GRACE_SECONDS = 45.0
"""A step of a large model takes tens of seconds, and the training stops between two. With what the worker does after it
this fits into the 60 s that its pods have for their end (deploy/kubernetes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    database_url: str
    data_dir: Path
    """Holds ``files/`` (shared with the API) and ``jobs/`` (checkpoints)."""
    registry_dir: Path
    base_models: Mapping[str, str]
    """Served base model id -> what a recipe's ``base_model`` takes."""
    num_threads: int | None = None
    """For arithmetic on the CPU. ``None`` = all cores but one: the rest of Capo needs to breathe."""
    gpus: int = 0
    """What this worker offers; it takes no job that needs more."""
    max_running_per_tenant: int | None = None
    """Jobs of one tenant that run at once, over all workers. ``None`` = no bound."""
    organization: str = "capo"
    """The service's own tenant: only its jobs may move aliases that belong to no tenant."""
    job_id: str | None = None
    """Work this job once, and no other, and end: how a launcher starts workers. ``None`` = whatever waits."""
    otlp_endpoint: str | None = None
    """Where the spans of attempts go. ``None`` = nowhere."""
    parent_pid: int | None = None
    """End when this parent ends. ``None`` = run on alone. See :func:`tune.jobs.process.die_with_parent`."""
    lease_seconds: float = 30.0
    """Silence after which another worker may take the job."""
    heartbeat_seconds: float = 5.0
    poll_seconds: float = 0.1
    """Between two looks at the queue; each is one indexed query."""
    stop_grace_seconds: float = STOP_GRACE_SECONDS
    """Between asking the training process to stop with a checkpoint and killing it, for a pause or the worker's end."""
    cancel_grace_seconds: float = 8.0
    """The same for a cancel, which needs no checkpoint and must end within 10 s."""
    max_attempts: int = 3
    retry_delay_seconds: float = 2.0
    """Before the second attempt; doubled before each further one."""
    busy_retry_seconds: float = 5.0
    """Between two looks at a directory in which what is left of an earlier attempt still works."""
    sweep_seconds: float = 60.0
    """Between two looks for what jobs left behind that ended while no worker had them."""

    @property
    def files_dir(self) -> Path:
        return files_dir(self.data_dir)

    @property
    def jobs_dir(self) -> Path:
        return self.data_dir / "jobs"

    def work_dir(self, job_id: str) -> Path:
        """Private to the job's training process; removed when the job has ended."""
        return self.jobs_dir / job_id


def files_dir(data_dir: Path) -> Path:
    """Where the bytes of uploaded files are, for the API and the workers alike."""
    return data_dir / "files"
