"""What is measured about fine-tuning: read from the job store, because workers are other processes, often elsewhere.

:meth:`JobMetrics.refresh` reads; a scrape shows what was read last, so that a slow or absent database neither blocks
nor breaks the metrics page. Ended jobs are never deleted, so their counts and sums only grow and are counters.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import ColumnElement, Connection, case, func, select

from registry.errors import CapoError
from registry.threads import Threads
from tune.jobs.database import Database
from tune.jobs.records import WAITING, JobStatus
from tune.jobs.schema import events, jobs, webhook_deliveries

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 5.0
WAIT_BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 14400)
RUN_BUCKETS = (10, 60, 300, 900, 3600, 14400, 86400)
_ENDED: tuple[JobStatus, ...] = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class _Running:
    """A job that a worker holds, and its newest step."""

    id: str
    heartbeat_age_seconds: float
    is_overdue: bool
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Histogram:
    cumulative: Sequence[int]
    """By bucket, then of all."""
    total_seconds: float


@dataclass(frozen=True, slots=True)
class _Snapshot:
    waiting: dict[str, int] = field(default_factory=dict)
    oldest_waiting_seconds: float = 0.0
    running: Sequence[_Running] = ()
    workers_busy: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    """By error code."""
    attempts: int = 0
    trained_tokens: int = 0
    waits: _Histogram | None = None
    durations: dict[str, _Histogram] = field(default_factory=dict)
    """By how the job ended."""
    webhooks_waiting: int = 0
    webhooks_overdue_seconds: float = 0.0


class JobMetrics(Collector):
    """Register it with a Prometheus registry and run :meth:`follow` as a task."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._snapshot = _Snapshot()
        self._is_readable = False
        self._read_at = 0.0

    def refresh(self) -> None:
        """Read the store; blocks. A store that cannot be read leaves the figures as they are and says so."""
        try:
            with self._database.read() as connection:
                self._snapshot = _read(connection, self._clock())
        except CapoError:
            self._is_readable = False
            return
        self._is_readable = True
        self._read_at = self._clock()

    async def follow(self) -> None:
        """Refresh every :data:`REFRESH_SECONDS` for ever; run as a task."""
        thread = Threads("job-metrics", 1)
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await thread.run(self.refresh)
            except Exception:  # a bug; without this task the figures would stand still until a restart
                if self._is_readable:
                    logger.exception("the figures of jobs cannot be read")
                self._is_readable = False

    def describe(self) -> list[Metric]:
        """Empty: the names are known, and asking for them must not need the store."""
        return []

    def collect(self) -> Iterator[Metric]:
        yield _gauge("capo_job_store_up", "1 while the job store can be read.", float(self._is_readable))
        yield _gauge("capo_job_store_read_timestamp_seconds", "When the figures of jobs were read.", self._read_at)
        yield from _families(self._snapshot)


def _read(connection: Connection, now: float) -> _Snapshot:
    counts = _counts(connection)
    ended: dict[str, int] = {status: counts[status, False] + counts[status, True] for status in _ENDED}
    queued = sum(counts[status, False] for status in WAITING)
    paused = sum(counts[status, True] for status in WAITING)
    since = connection.execute(
        select(func.min(func.coalesce(jobs.c.queued_at, jobs.c.heartbeat_at, jobs.c.created_at))).where(
            jobs.c.status.in_(WAITING), jobs.c.paused.is_(False)
        )
    ).scalar_one()
    totals = connection.execute(select(func.sum(jobs.c.claims), func.sum(jobs.c.trained_tokens))).one()
    owners = select(func.count(jobs.c.owner.distinct())).where(jobs.c.status == "running")
    failures = select(jobs.c.error_code, func.count()).where(jobs.c.status == "failed").group_by(jobs.c.error_code)
    table = webhook_deliveries
    due_at = case((table.c.due_at > table.c.created_at, table.c.due_at), else_=table.c.created_at)  # 0 means at once
    webhooks = select(func.count(), func.min(due_at)).where(table.c.status == "waiting")
    webhooks_waiting, first_due_at = connection.execute(webhooks).one()
    waited = jobs.c.started_at - jobs.c.created_at
    ran = jobs.c.finished_at - jobs.c.started_at
    return _Snapshot(
        waiting={"queued": queued, "paused": paused},
        oldest_waiting_seconds=0.0 if since is None else max(0.0, now - since),
        running=_running(connection, now),
        workers_busy=connection.execute(owners).scalar_one(),
        ended=ended,
        failed={code or "unknown": count for code, count in connection.execute(failures)},
        attempts=int(totals[0] or 0),
        trained_tokens=int(totals[1] or 0),
        waits=_histogram(connection, waited, WAIT_BUCKETS, jobs.c.started_at.is_not(None)),
        durations={
            status: _histogram(connection, ran, RUN_BUCKETS, jobs.c.status == status, ran.is_not(None))
            for status in _ENDED
        },
        webhooks_waiting=webhooks_waiting,
        webhooks_overdue_seconds=0.0 if first_due_at is None else max(0.0, now - first_due_at),
    )


def _counts(connection: Connection) -> defaultdict[tuple[str, bool], int]:
    counts: defaultdict[tuple[str, bool], int] = defaultdict(int)
    query = select(jobs.c.status, jobs.c.paused, func.count()).group_by(jobs.c.status, jobs.c.paused)
    for status, paused, count in connection.execute(query):
        counts[status, bool(paused)] += count
    return counts


def _running(connection: Connection, now: float) -> list[_Running]:
    """As many as there are workers, so a look at each one's newest step is cheap."""
    found = []
    for row in connection.execute(select(jobs).where(jobs.c.status == "running").order_by(jobs.c.position)).all():
        newest = (
            select(events.c.data)
            .where(events.c.job_id == row.id, events.c.kind == "metrics")
            .order_by(events.c.sequence.desc())
            .limit(1)
        )
        age = max(0.0, now - (row.heartbeat_at or now))
        figures = connection.execute(newest).scalar_one_or_none() or {}
        found.append(_Running(row.id, age, age > row.lease_seconds, figures))
    return found


def _histogram(
    connection: Connection, value: ColumnElement[Any], buckets: Sequence[int], *conditions: ColumnElement[bool]
) -> _Histogram:
    """One pass over the jobs; every bucket counts what is at most its bound, as Prometheus wants it."""
    within = [func.sum(case((value <= bound, 1), else_=0)) for bound in buckets]
    row = connection.execute(select(*within, func.count(), func.sum(value)).where(*conditions)).one()
    *cumulative, total_seconds = (0 if number is None else number for number in row)
    return _Histogram([int(number) for number in cumulative], float(total_seconds))


# -- in Prometheus' form --------------------------------------------------------------------------------------------


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _families(snapshot: _Snapshot) -> Iterator[Metric]:
    by_status = GaugeMetricFamily("capo_jobs", "Fine-tuning jobs that have not ended.", labels=("status",))
    for status, count in {**snapshot.waiting, "running": len(snapshot.running)}.items():
        by_status.add_metric((status,), count)
    yield by_status
    yield _gauge(
        "capo_job_oldest_wait_seconds", "How long the first in the queue waits.", snapshot.oldest_waiting_seconds
    )
    yield _gauge("capo_training_workers_busy", "Workers that hold a job.", snapshot.workers_busy)
    yield from _running_families(snapshot.running)
    ended = CounterMetricFamily("capo_jobs_ended", "Jobs that ended, by how.", labels=("status",))
    for status, count in snapshot.ended.items():
        ended.add_metric((status,), count)
    yield ended
    failed = CounterMetricFamily("capo_jobs_failed", "Jobs that failed, by error code.", labels=("code",))
    for code, count in sorted(snapshot.failed.items()):
        failed.add_metric((code,), count)
    yield failed
    yield CounterMetricFamily("capo_job_attempts", "Times a worker began a job.", value=snapshot.attempts)
    yield CounterMetricFamily(
        "capo_trained_tokens", "Tokens that ended jobs were trained on.", value=snapshot.trained_tokens
    )
    waits = HistogramMetricFamily("capo_job_wait_seconds", "From a job's creation to its first start.", labels=())
    if snapshot.waits is not None:
        waits.add_metric((), *_in_buckets(snapshot.waits, WAIT_BUCKETS))
    yield waits
    durations = HistogramMetricFamily("capo_job_seconds", "From a job's first start to its end.", labels=("status",))
    for status, histogram in snapshot.durations.items():
        durations.add_metric((status,), *_in_buckets(histogram, RUN_BUCKETS))
    yield durations
    yield _gauge(
        "capo_webhook_deliveries_waiting", "Messages to be sent, now or later.", float(snapshot.webhooks_waiting)
    )
    yield _gauge(
        "capo_webhook_overdue_seconds",
        "How long the first message that is due waits to be sent.",
        snapshot.webhooks_overdue_seconds,
    )


def _running_families(running: Sequence[_Running]) -> Iterator[Metric]:
    """Series by job; a job's go when it ends."""
    overdue = sum(job.is_overdue for job in running)
    yield _gauge("capo_jobs_overdue", "Running jobs whose worker was silent for longer than its lease.", overdue)
    speed = sum(job.figures.get("tokens_per_second") or 0.0 for job in running)
    yield _gauge("capo_training_tokens_per_second", "Of all running jobs, at their newest step.", speed)
    heartbeat = GaugeMetricFamily(
        "capo_job_heartbeat_age_seconds", "Since the worker's last sign of life.", labels=("job_id",)
    )
    progress = GaugeMetricFamily("capo_job_progress_ratio", "Steps done of all steps.", labels=("job_id",))
    loss = GaugeMetricFamily("capo_job_train_loss", "Training loss at the newest step.", labels=("job_id",))
    for job in running:
        heartbeat.add_metric((job.id,), job.heartbeat_age_seconds)
        if total_steps := job.figures.get("total_steps"):
            progress.add_metric((job.id,), job.figures.get("step", 0) / total_steps)
        if (train_loss := job.figures.get("train_loss")) is not None:
            loss.add_metric((job.id,), train_loss)
    yield from (heartbeat, progress, loss)


def _in_buckets(histogram: _Histogram, bounds: Sequence[int]) -> tuple[list[tuple[str, float]], float]:
    names = itertools.chain(map(str, map(float, bounds)), ("+Inf",))
    return list(zip(names, map(float, histogram.cumulative), strict=True)), histogram.total_seconds
