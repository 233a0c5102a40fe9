"""The job store's front half: jobs and their events, as the API reads and writes them.

The workers' half is :mod:`tune.jobs.queue`; both speak to one :class:`~tune.jobs.database.Database`.
Every method is one transaction, blocks, and may be called from many threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import and_, exists, false, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from registry.errors import ConflictError
from tune.jobs.database import Database
from tune.jobs.idempotency import Idempotency, enter, find_made
from tune.jobs.records import (
    OPEN,
    WAITING,
    EventRecord,
    JobRecord,
    NewEvent,
    NewJob,
    Page,
)
from tune.jobs.rows import (
    append_events,
    event_record,
    job_record,
    live_file,
    load_job,
    new_id,
    owned,
    position_of,
    unknown_cursor,
)
from tune.jobs.schema import events, job_files, job_metadata, jobs
from tune.jobs.starting_model import base_of
from tune.jobs.webhooks.outbox import announce

SILENCE_FACTOR = 2.0
"""After this many leases without a heartbeat a cancel does not wait for the worker any more."""
_NEWS_LIMIT = 200


@dataclass(frozen=True, slots=True)
class News:
    """Events that a follower of a job has not seen."""

    events: Sequence[EventRecord]
    is_complete: bool
    """The job has ended, and its last event is among these or was seen before."""


def fine_tuned_name(base: str, tenant: str, suffix: str | None) -> str:
    """A new ``ft:<base>:<organization>:<suffix>:<id>``, as OpenAI names results; the suffix may be empty."""
    return f"ft:{base}:{tenant}:{suffix or ''}:{new_id('', 8)}"


class JobStore:
    """Jobs and events as the API sees them: those of ``tenant``, or everybody's, for workers.

    The tenant stands in ``ft:`` names and in ``organization_id``; creating a job needs one.
    """

    def __init__(
        self, database: Database, *, tenant: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._tenant = tenant
        self._clock = clock

    def seen_by(self, tenant: str) -> JobStore:
        """The same store as one tenant sees it: nobody else's jobs are there."""
        return JobStore(self._database, tenant=tenant, clock=self._clock)

    @property
    def tenant(self) -> str:
        assert self._tenant is not None, "this is everybody's view of the store, and whose job is it?"
        return self._tenant

    def close(self) -> None:
        self._database.close()

    def made_by(self, asked: Idempotency) -> JobRecord | None:
        """The job that this request made before. Raises :class:`ConflictError` if its key made another one."""
        with self._database.read() as connection:
            job_id = find_made(connection, asked, tenant=self.tenant, now=self._clock())
            return None if job_id is None else load_job(connection, job_id, tenant=self._tenant)

    def create_job(
        self, new: NewJob, first_events: Sequence[NewEvent] = (), *, asked: Idempotency | None = None
    ) -> JobRecord:
        """Write the job as ``queued`` with its first events; or return the one that ``asked`` made before.

        Raises:
            NotFoundError: one of its files was deleted meanwhile.
            ConflictError: the key of ``asked`` made another job.
        """
        try:
            return self._create_job(new, first_events, asked)
        except IntegrityError:
            made = None if asked is None else self.made_by(asked)
            if made is None:
                raise
            return made

    def _create_job(self, new: NewJob, first_events: Sequence[NewEvent], asked: Idempotency | None) -> JobRecord:
        created_at = self._clock()
        now = int(created_at)
        job_id = new_id("ftjob-")
        name = fine_tuned_name(base_of(new.model), self.tenant, new.suffix)
        with self._database.write() as connection:
            for file_id in filter(None, (new.training_file, new.validation_file, *new.further_files)):
                live_file(connection, file_id, now=now, tenant=self._tenant, lock=True)
            connection.execute(
                insert(jobs).values(
                    id=job_id,
                    status="queued",
                    model=new.model,
                    tenant=self.tenant,
                    training_file=new.training_file,
                    validation_file=new.validation_file,
                    suffix=new.suffix,
                    seed=new.seed,
                    hyperparameters=asdict(new.hyperparameters),
                    metadata=None if new.metadata is None else dict(new.metadata),
                    extensions=dict(new.extensions),
                    integrations=[dict(integration) for integration in new.integrations] or None,
                    method=new.method,
                    priority=new.priority,
                    gpus=new.gpus,
                    reserved_name=name,
                    created_at=now,
                    queued_at=created_at,
                    result_files=[],
                    trace_headers=None if new.trace_headers is None else dict(new.trace_headers),
                )
            )
            for file_id in new.further_files:
                connection.execute(insert(job_files).values(job_id=job_id, file_id=file_id))
            if new.metadata:
                pairs = [{"job_id": job_id, "key": key, "value": value} for key, value in new.metadata.items()]
                connection.execute(insert(job_metadata), pairs)
            if asked is not None:
                enter(connection, asked, job_id, tenant=self.tenant, now=now)
            append_events(
                connection,
                job_id,
                [NewEvent(f"Created fine-tuning job: {job_id}"), *first_events],
                now=now,
            )
            return load_job(connection, job_id)

    def job(self, job_id: str) -> JobRecord:
        with self._database.read() as connection:
            return load_job(connection, job_id, tenant=self._tenant)

    def is_open(self, job_id: str) -> bool:
        """Whether the job exists and has not ended."""
        query = select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.status.in_(OPEN))
        with self._database.read() as connection:
            return connection.execute(query).scalar_one_or_none() is not None

    def jobs(
        self,
        *,
        after: str | None,
        limit: int,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
    ) -> Page[JobRecord]:
        """Newest first; ``metadata`` keeps the jobs that carry all of these pairs."""
        query = select(jobs).where(owned(jobs, self._tenant)).order_by(jobs.c.position.desc()).limit(limit + 1)
        for key, value in (metadata or {}).items():
            query = query.where(
                exists().where(
                    and_(
                        job_metadata.c.job_id == jobs.c.id,
                        job_metadata.c.key == key,
                        job_metadata.c.value == value,
                    )
                )
            )
        if without_metadata:
            query = query.where(jobs.c.metadata.is_(None))
        with self._database.read() as connection:
            if after is not None:
                query = query.where(jobs.c.position < position_of(connection, jobs, after, tenant=self._tenant))
            rows = connection.execute(query).all()
        return Page([job_record(row) for row in rows[:limit]], len(rows) > limit)

    def cancel(self, job_id: str, *, waits_for_a_worker: bool = False) -> JobRecord:
        """Cancel a waiting job at once; ask the worker of a running one to stop. Repeating it is fine.

        A running job whose worker has long been silent is cancelled at once too: its epoch moves on, so
        a worker that comes back is refused. Not so if it ``waits_for_a_worker``: its result is published, and the next
        worker will find that it has succeeded.

        Raises:
            NotFoundError: there is no such job.
            ConflictError: the job has already succeeded or failed.
        """
        now = self._clock()
        silent = and_(jobs.c.status == "running", jobs.c.heartbeat_at + SILENCE_FACTOR * jobs.c.lease_seconds < now)
        with self._database.write() as connection:
            ended = connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, owned(jobs, self._tenant))
                .where(or_(jobs.c.status.in_(WAITING), false() if waits_for_a_worker else silent))
                .values(
                    status="cancelled",
                    cancel_requested=True,
                    epoch=jobs.c.epoch + 1,
                    owner=None,
                    finished_at=int(now),
                    estimated_finish=None,
                    paused=False,
                )
            ).rowcount
            if ended:
                append_events(connection, job_id, [NewEvent("Fine-tuning job cancelled")], now=int(now))
                cancelled = load_job(connection, job_id)
                announce(connection, job_id=job_id, tenant=cancelled.tenant, status="cancelled", now=int(now))
                return cancelled
            asked = connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, owned(jobs, self._tenant))
                .where(jobs.c.status == "running", jobs.c.cancel_requested.is_(False))
                .values(cancel_requested=True)
            ).rowcount
            if asked:
                append_events(connection, job_id, [NewEvent("Cancellation requested")], now=int(now))
            job = load_job(connection, job_id, tenant=self._tenant)
        if job.status in ("succeeded", "failed"):
            raise ConflictError(
                f"{job_id} has already {job.status}; only a job that has not ended can be cancelled",
                code="job_already_ended",
            )
        return job

    def pause(self, job_id: str) -> JobRecord:
        """Keep a waiting job from being taken; ask the worker of a running one to put it back. Repeating is fine.

        Raises:
            NotFoundError: there is no such job.
            ConflictError: the job has ended, or is being cancelled.
        """
        return self._set_paused(job_id, paused=True, event=NewEvent("Fine-tuning job paused"))

    def resume(self, job_id: str) -> JobRecord:
        """Let a paused job go on; any worker takes it up at its last checkpoint. Raises as :meth:`pause`."""
        return self._set_paused(job_id, paused=False, event=NewEvent("Fine-tuning job resumed; it is queued again"))

    def _set_paused(self, job_id: str, *, paused: bool, event: NewEvent) -> JobRecord:
        with self._database.write() as connection:
            changed = connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, owned(jobs, self._tenant))
                .where(jobs.c.status.in_(OPEN), jobs.c.cancel_requested.is_(False))
                .where(jobs.c.paused.is_(not paused))
                .values(paused=paused, not_before=0.0, **({} if paused else {"queued_at": self._clock()}))
            ).rowcount
            if changed:
                if paused and load_job(connection, job_id).status == "running":
                    event = NewEvent("Pause requested")
                append_events(connection, job_id, [event], now=int(self._clock()))
            job = load_job(connection, job_id, tenant=self._tenant)
        if job.status not in OPEN or job.cancel_requested:
            state = "is being cancelled" if job.status in OPEN else f"has already ended as {job.status}"
            raise ConflictError(
                f"{job_id} {state}; only a job that has not ended can be paused or resumed", code="job_already_ended"
            )
        return job

    def events(self, job_id: str, *, after: str | None, limit: int) -> Page[EventRecord]:
        """Newest first, as OpenAI lists them."""
        query = select(events).where(events.c.job_id == job_id).order_by(events.c.sequence.desc())
        with self._database.read() as connection:
            load_job(connection, job_id, tenant=self._tenant)
            if after is not None:
                sequence = connection.execute(
                    select(events.c.sequence).where(events.c.id == after, events.c.job_id == job_id)
                ).scalar_one_or_none()
                if sequence is None:
                    raise unknown_cursor(after)
                query = query.where(events.c.sequence < sequence)
            rows = connection.execute(query.limit(limit + 1)).all()
        return Page([event_record(row) for row in rows[:limit]], len(rows) > limit)

    def event_sequence(self, job_id: str, event_id: str | None) -> int:
        """The number of one of the job's events, for :meth:`news`; 0 for ``None``.

        Raises:
            NotFoundError: there is no such job.
            InvalidRequestError: the job has no such event.
        """
        with self._database.read() as connection:
            load_job(connection, job_id, tenant=self._tenant)
            if event_id is None:
                return 0
            number = connection.execute(
                select(events.c.sequence).where(events.c.id == event_id, events.c.job_id == job_id)
            ).scalar_one_or_none()
        if number is None:
            raise unknown_cursor(event_id)
        return int(number)

    def news(self, job_id: str, sequence: int) -> News:
        """What came after ``sequence``, at most some hundred events at a time.

        Job and events are of one moment, so that nothing is missed of a job that is ending.
        """
        query = select(events).where(events.c.job_id == job_id, events.c.sequence > sequence)
        with self._database.read() as connection:
            job = load_job(connection, job_id, tenant=self._tenant)
            rows = connection.execute(query.order_by(events.c.sequence).limit(_NEWS_LIMIT)).all()
        return News([event_record(row) for row in rows], job.status not in OPEN and len(rows) < _NEWS_LIMIT)

    def events_since(self, job_id: str, sequence: int, *, limit: int = 1000) -> list[EventRecord]:
        """Oldest first, those after ``sequence`` (0 = from the beginning): for following a job."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(events)
                .where(events.c.job_id == job_id, events.c.sequence > sequence)
                .order_by(events.c.sequence)
                .limit(limit)
            ).all()
        return [event_record(row) for row in rows]
