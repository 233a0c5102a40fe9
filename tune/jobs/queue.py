"""The job store's back half: how workers claim jobs, stay their owners, and end them.

Execution is at least once, publication exactly once. A claim is one compare-and-set that raises the job's
``epoch``; every later write of the worker names ``(job id, epoch)`` and is refused with
:class:`~registry.errors.ConflictError` (code ``lease_lost``) as soon as the epoch has moved on or the job has
ended. So two workers may for a while both believe that a job is theirs, but only one can change it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, insert, or_, select, update

from registry.errors import ConflictError
from tune.jobs.database import Database
from tune.jobs.records import FileRecord, JobError, JobRecord, NewEvent
from tune.jobs.rows import append_events, job_record, load_job
from tune.jobs.schema import files, jobs

LEASE_LOST = "lease_lost"
MAX_RETRY_DELAY_SECONDS = 300.0

Asked = Literal["cancel", "pause"]
"""What a client wants of a running job."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job that succeeded leaves behind."""

    revision: str
    trained_tokens: int | None
    result_file: FileRecord | None


class WorkQueue:
    """One worker's view of the store. Each method is one transaction and blocks."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def close(self) -> None:
        self._database.close()

    def next_waiting(self) -> JobRecord | None:
        """The next job that may start now, still unclaimed: by priority, then by age."""
        now = self._clock()
        due = or_(
            jobs.c.not_before <= now,
            jobs.c.not_before > now + MAX_RETRY_DELAY_SECONDS,  # the clock was set back: do not wait for it
        )
        query = (
            select(jobs)
            .where(jobs.c.status == "queued", jobs.c.paused.is_(False), due)
            .order_by(jobs.c.priority.desc(), jobs.c.position)
            .limit(1)
        )
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else job_record(row)

    def running(self) -> list[JobRecord]:
        """Every running job, whoever holds it: what a :class:`~tune.jobs.lease.LeaseWatch` looks at."""
        query = select(jobs).where(jobs.c.status == "running").order_by(jobs.c.position)
        with self._database.read() as connection:
            return [job_record(row) for row in connection.execute(query)]

    def claim(self, seen: JobRecord, *, owner: str, lease_seconds: float) -> JobRecord | None:
        """Take the job if it is still as ``seen``; ``None`` when somebody else was first."""
        now = self._clock()
        unchanged = (
            jobs.c.id == seen.id,
            jobs.c.status == seen.status,
            jobs.c.epoch == seen.epoch,
            jobs.c.heartbeats == seen.heartbeats,
            # A job that was paused meanwhile stays where it is; an abandoned one must be taken to be put back.
            or_(jobs.c.status == "running", jobs.c.paused.is_(False)),
        )
        with self._database.write() as connection:
            won = connection.execute(
                update(jobs)
                .where(*unchanged)
                .values(
                    status="running",
                    owner=owner,
                    epoch=jobs.c.epoch + 1,
                    heartbeats=0,
                    heartbeat_at=now,
                    lease_seconds=lease_seconds,
                    attempts=jobs.c.attempts + 1,
                    started_at=int(now) if seen.started_at is None else seen.started_at,
                )
            ).rowcount
            if not won:
                return None
            return load_job(connection, seen.id)

    def heartbeat(self, job: JobRecord) -> JobRecord:
        """Renew the lease. Raises :class:`ConflictError` when it is lost."""
        with self._database.write() as connection:
            self._change(connection, job, heartbeats=jobs.c.heartbeats + 1, heartbeat_at=self._clock())
            return load_job(connection, job.id)

    def asked(self, job: JobRecord) -> Asked | None:
        """Whether and why the owner should stop. Raises :class:`ConflictError` when the lease is lost."""
        query = select(jobs.c.cancel_requested, jobs.c.paused).where(*_held(job))
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise _lease_lost(job)
        if row.cancel_requested:
            return "cancel"
        return "pause" if row.paused else None

    def add_events(self, job: JobRecord, new: Sequence[NewEvent], *, estimated_finish: int | None = None) -> None:
        with self._database.write() as connection:
            self._change(connection, job, estimated_finish=estimated_finish)
            append_events(connection, job.id, new, now=int(self._clock()))

    def succeed(self, job: JobRecord, outcome: Outcome) -> None:
        """The artifact is published; make the job say so. The result file becomes visible with it."""
        with self._database.write() as connection:
            self._end(
                connection,
                job,
                [
                    NewEvent(f"New fine-tuned model created: {job.reserved_name}"),
                    NewEvent("The job has successfully completed"),
                ],
                status="succeeded",
                fine_tuned_model=job.reserved_name,
                revision=outcome.revision,
                trained_tokens=outcome.trained_tokens,
                result_files=[] if outcome.result_file is None else [outcome.result_file.id],
            )
            if outcome.result_file is not None:
                connection.execute(insert(files).values(**asdict(outcome.result_file)))

    def fail(self, job: JobRecord, error: JobError) -> None:
        with self._database.write() as connection:
            self._end(
                connection,
                job,
                [NewEvent(error.message, level="error", data={"code": error.code})],
                status="failed",
                error_code=error.code,
                error_message=error.message,
                error_param=error.param,
            )

    def end_cancelled(self, job: JobRecord) -> None:
        with self._database.write() as connection:
            self._end(connection, job, [NewEvent("Fine-tuning job cancelled")], status="cancelled")

    def requeue(self, job: JobRecord, reason: str, *, delay_seconds: float = 0.0, counts: bool = True) -> None:
        """Give the job back to the queue. ``counts=False`` forgives the attempt: the job was not at fault."""
        with self._database.write() as connection:
            self._change(
                connection,
                job,
                status="queued",
                owner=None,
                estimated_finish=None,
                not_before=self._clock() + min(delay_seconds, MAX_RETRY_DELAY_SECONDS),
                attempts=jobs.c.attempts - (0 if counts else 1),
            )
            event = NewEvent(reason, level="warn" if counts else "info")
            append_events(connection, job.id, [event], now=int(self._clock()))

    def _end(self, connection: Connection, job: JobRecord, last: Sequence[NewEvent], **values: Any) -> None:
        now = int(self._clock())
        self._change(connection, job, owner=None, finished_at=now, estimated_finish=None, **values)
        append_events(connection, job.id, last, now=now)

    def _change(self, connection: Connection, job: JobRecord, **values: Any) -> None:
        changed = connection.execute(update(jobs).where(*_held(job)).values(**values)).rowcount
        if changed != 1:
            raise _lease_lost(job)


def _held(job: JobRecord) -> tuple[Any, ...]:
    return (jobs.c.id == job.id, jobs.c.epoch == job.epoch, jobs.c.status == "running")


def _lease_lost(job: JobRecord) -> ConflictError:
    return ConflictError(
        f"{job.id} is no longer held under epoch {job.epoch}: it was taken over, cancelled or has ended",
        code=LEASE_LOST,
    )
