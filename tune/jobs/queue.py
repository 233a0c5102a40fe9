"""The job store's back half: how workers claim jobs, stay their owners, and end them.

Execution is at least once, publication exactly once. A claim is one compare-and-set that raises the job's
``epoch``; every later write of the worker names ``(job id, epoch)`` and is refused with
:class:`~registry.errors.ConflictError` (code ``lease_lost``) as soon as the epoch has moved on or the job has
ended. So two workers may for a while both believe that a job is theirs, but only one can change it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, and_, func, insert, or_, select, update

from registry.errors import ConflictError
from tune.jobs.database import Database
from tune.jobs.records import FileRecord, JobError, JobRecord, NewEvent
from tune.jobs.rows import append_events, job_record, load_job
from tune.jobs.schema import events, files, jobs
from tune.jobs.webhooks.outbox import announce

LEASE_LOST = "lease_lost"
MAX_RETRY_DELAY_SECONDS = 300.0

_CLAIM_LOCK = 0x636C61696D  # "claim"; see tune.jobs.migrations for its neighbour

Asked = Literal["cancel", "pause"]
"""What a client wants of a running job."""

RequeueReason = Literal["paused", "worker_stopping", "training_lost", "machine_fault", "directory_busy"]
"""Why a worker gave a job back, for programs; the event's message says it for people. What is wrong with a job's data
is no reason: the job fails, because it would fail again."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job that succeeded leaves behind."""

    revision: str
    trained_tokens: int | None
    result_file: FileRecord | None


class WorkQueue:
    """One worker's view of the store. Each method is one transaction and blocks.

    ``gpus`` is what the worker offers; jobs that need more stay where they are. ``max_running_per_tenant`` bounds the
    jobs of one tenant that run at once, over all workers; ``None`` = no bound.
    """

    def __init__(
        self,
        database: Database,
        *,
        gpus: int = 0,
        max_running_per_tenant: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._gpus = gpus
        self._max_running_per_tenant = max_running_per_tenant
        self._clock = clock

    def close(self) -> None:
        self._database.close()

    def next_waiting(self, *, launched: Collection[str] = (), held_back: Collection[str] = ()) -> JobRecord | None:
        """The next job that may start now, still unclaimed.

        The highest priority goes first; of equal ones a job of the tenant that has the fewest running, so that one
        tenant's hundred jobs do not hold up another's one; then the oldest. Jobs in ``launched``, whose workers are
        on their way, count as running; those in ``held_back`` are passed over.
        """
        taken = or_(jobs.c.status == "running", and_(jobs.c.status == "queued", jobs.c.id.in_(launched)))
        busy = select(jobs.c.tenant, func.count().label("jobs")).where(taken).group_by(jobs.c.tenant).subquery()
        running = func.coalesce(busy.c.jobs, 0)
        query = (
            select(jobs.c.id)
            .select_from(jobs.outerjoin(busy, busy.c.tenant == jobs.c.tenant))
            .where(jobs.c.status == "queued", jobs.c.paused.is_(False), jobs.c.gpus <= self._gpus)
            .where(self._is_due(), jobs.c.id.not_in([*launched, *held_back]))
            .order_by(jobs.c.priority.desc(), running, jobs.c.position)
            .limit(1)
        )
        if self._max_running_per_tenant is not None:
            query = query.where(running < self._max_running_per_tenant)
        with self._database.read() as connection:
            job_id = connection.execute(query).scalar_one_or_none()
            return None if job_id is None else load_job(connection, job_id)

    def is_due(self, job_id: str) -> bool:
        """Whether the job waits for nothing but a worker."""
        query = select(jobs.c.id).where(
            jobs.c.id == job_id, jobs.c.status == "queued", jobs.c.paused.is_(False), self._is_due()
        )
        with self._database.read() as connection:
            return connection.execute(query).scalar_one_or_none() is not None

    def _is_due(self) -> ColumnElement[bool]:
        now = self._clock()
        return or_(
            jobs.c.not_before <= now,
            jobs.c.not_before > now + MAX_RETRY_DELAY_SECONDS,  # the clock was set back: do not wait for it
        )

    def running(self) -> list[JobRecord]:
        """Every running job, whoever holds it: what a :class:`~tune.jobs.lease.LeaseWatch` looks at."""
        query = select(jobs).where(jobs.c.status == "running").order_by(jobs.c.position)
        with self._database.read() as connection:
            return [job_record(row) for row in connection.execute(query)]

    def claim(self, seen: JobRecord, *, owner: str, lease_seconds: float) -> JobRecord | None:
        """Take the job if it is still as ``seen``; ``None`` when somebody else was first, or it may not start."""
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
            if seen.status == "queued" and not self._may_start(connection, seen):
                return None
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
                    claims=jobs.c.claims + 1,
                    started_at=int(now) if seen.started_at is None else seen.started_at,
                )
            ).rowcount
            if not won:
                return None
            if seen.status == "running":
                text = "The worker that had the job was lost; another one takes it over"
                lost = NewEvent(text, level="warn", data={"reason": "worker_lost"})
                append_events(connection, seen.id, [lost], now=int(now))
            return load_job(connection, seen.id)

    def _may_start(self, connection: Connection, seen: JobRecord) -> bool:
        if seen.gpus > self._gpus:
            return False
        if self._max_running_per_tenant is None:
            return True
        if connection.dialect.name == "postgresql":
            # Two claims at the same moment would both count the same. SQLite's writers exclude each other anyway.
            connection.execute(select(func.pg_advisory_xact_lock(_CLAIM_LOCK)))
        query = select(func.count()).where(jobs.c.tenant == seen.tenant, jobs.c.status == "running")
        return int(connection.execute(query).scalar_one()) < self._max_running_per_tenant

    def heartbeat(self, job: JobRecord) -> JobRecord:
        """Renew the lease. Raises :class:`ConflictError` when it is lost."""
        with self._database.write() as connection:
            self._change(connection, job, heartbeats=jobs.c.heartbeats + 1, heartbeat_at=self._clock())
            return load_job(connection, job.id)

    def check(self, job: JobRecord) -> None:
        """Raises :class:`ConflictError` when the lease is lost."""
        self.asked(job)

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

    def last_told_step(self, job: JobRecord) -> int:
        """The last step whose metrics stand in the job's events, whoever wrote them; 0 = none."""
        query = (
            select(events.c.data)
            .where(events.c.job_id == job.id, events.c.kind == "metrics")
            .order_by(events.c.sequence.desc())
            .limit(1)
        )
        with self._database.read() as connection:
            data = connection.execute(query).scalar_one_or_none()
        return 0 if data is None else int(data["step"])

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

    def requeue(
        self,
        job: JobRecord,
        message: str,
        *,
        reason: RequeueReason,
        delay_seconds: float = 0.0,
        counts: bool = True,
    ) -> None:
        """Give the job back to the queue. ``counts=False`` forgives the attempt: the job was not at fault."""
        now = self._clock()
        with self._database.write() as connection:
            self._change(
                connection,
                job,
                status="queued",
                owner=None,
                estimated_finish=None,
                queued_at=now,
                not_before=now + min(delay_seconds, MAX_RETRY_DELAY_SECONDS),
                attempts=jobs.c.attempts - (0 if counts else 1),
            )
            event = NewEvent(message, level="warn" if counts else "info", data={"reason": reason})
            append_events(connection, job.id, [event], now=int(now))

    def note(self, seen: JobRecord, event: NewEvent) -> None:
        """Tell in the events of a job that waits for its worker why that does not come; nothing if it has moved on."""
        unchanged = (jobs.c.id == seen.id, jobs.c.status == "queued", jobs.c.epoch == seen.epoch)
        with self._database.write() as connection:
            if connection.execute(select(jobs.c.id).where(*unchanged).with_for_update()).one_or_none() is not None:
                append_events(connection, seen.id, [event], now=int(self._clock()))

    def _end(self, connection: Connection, job: JobRecord, last: Sequence[NewEvent], **values: Any) -> None:
        now = int(self._clock())
        # A pause that came too late is over with its job.
        self._change(connection, job, owner=None, finished_at=now, estimated_finish=None, paused=False, **values)
        append_events(connection, job.id, last, now=now)
        announce(connection, job_id=job.id, tenant=job.tenant, status=values["status"], now=now)

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
