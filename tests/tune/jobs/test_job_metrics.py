"""The figures of fine-tuning, read from the store on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from registry.errors import UnavailableError
from tests.serve.running import eventually
from tests.tune.jobs.standins import step_metrics
from tests.tune.jobs.support import TENANT, Place, add_file_row, new_job
from tune.jobs.metrics import JobMetrics
from tune.jobs.observer import JobObserver
from tune.jobs.queue import Outcome, WorkQueue
from tune.jobs.records import JobError
from tune.jobs.store import JobStore
from tune.jobs.webhooks.endpoints import EVENT_TYPES, EndpointStore
from tune.jobs.webhooks.outbox import Outbox


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def figures(metrics: JobMetrics) -> dict[str, float]:
    """The page that a scrape gets, by series."""
    registry = CollectorRegistry()
    registry.register(metrics)
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


@pytest.fixture
def place(any_place: Place) -> Place:
    return any_place


def test_jobs_are_counted_by_state_and_timed(place: Place) -> None:
    clock = Clock()
    store, queue = JobStore(place.database, tenant=TENANT, clock=clock), WorkQueue(place.database, clock=clock)
    metrics = JobMetrics(place.database, clock=clock)
    file_id = add_file_row(place.file_rows)
    done, failed, running, _, paused = [store.create_job(new_job(file_id)) for _ in range(5)]
    store.pause(paused.id)
    clock.now += 10
    claimed = {}
    for job in (done, failed, running):
        taken = queue.claim(job, owner="worker", lease_seconds=30)
        assert taken is not None
        claimed[job.id] = taken
    clock.now += 50
    queue.succeed(claimed[done.id], Outcome(revision="m@0123456789abcdef", trained_tokens=700, result_file=None))
    queue.fail(claimed[failed.id], JobError("invalid_data", "line 3"))
    observer = JobObserver(queue, claimed[running.id])
    observer.on_step(step_metrics(2))
    observer.close()
    clock.now += 20
    metrics.refresh()
    found = figures(metrics)
    expected = {
        'capo_jobs{status="queued"}': 1,
        'capo_jobs{status="paused"}': 1,
        'capo_jobs{status="running"}': 1,
        "capo_job_oldest_wait_seconds": 80,
        "capo_training_workers_busy": 1,
        'capo_jobs_ended_total{status="succeeded"}': 1,
        'capo_jobs_ended_total{status="failed"}': 1,
        'capo_jobs_ended_total{status="cancelled"}': 0,
        'capo_jobs_failed_total{code="invalid_data"}': 1,
        "capo_job_attempts_total": 3,
        "capo_trained_tokens_total": 700,
        'capo_job_wait_seconds_bucket{le="5.0"}': 0,
        'capo_job_wait_seconds_bucket{le="15.0"}': 3,
        "capo_job_wait_seconds_count": 3,
        "capo_job_wait_seconds_sum": 30,
        'capo_job_seconds_bucket{le="10.0",status="succeeded"}': 0,
        'capo_job_seconds_bucket{le="60.0",status="succeeded"}': 1,
        'capo_job_seconds_sum{status="succeeded"}': 50,
        "capo_jobs_overdue": 1,
        f'capo_job_heartbeat_age_seconds{{job_id="{running.id}"}}': 70,
        f'capo_job_progress_ratio{{job_id="{running.id}"}}': 2 / step_metrics(2).total_steps,
        "capo_training_tokens_per_second": step_metrics(2).tokens_per_second,
        "capo_job_store_up": 1,
    }
    assert {name: found.get(name) for name in expected} == pytest.approx(expected)


def test_a_job_that_went_back_waits_since_it_is_in_the_queue_again(place: Place) -> None:
    clock = Clock()
    store, queue = JobStore(place.database, tenant=TENANT, clock=clock), WorkQueue(place.database, clock=clock)
    job = store.create_job(new_job(add_file_row(place.file_rows)))
    claimed = queue.claim(job, owner="worker", lease_seconds=30)
    assert claimed is not None
    clock.now += 500
    held = queue.heartbeat(claimed)
    queue.requeue(held, "the worker stopped", reason="worker_stopping", counts=False)
    clock.now += 7
    metrics = JobMetrics(place.database, clock=clock)
    metrics.refresh()
    assert figures(metrics)["capo_job_oldest_wait_seconds"] == 7


def test_a_job_that_is_resumed_did_not_wait_while_it_was_paused(place: Place) -> None:
    clock = Clock()
    store, metrics = JobStore(place.database, tenant=TENANT, clock=clock), JobMetrics(place.database, clock=clock)
    job = store.create_job(new_job(add_file_row(place.file_rows)))
    store.pause(job.id)
    clock.now += 20_000
    store.resume(job.id)
    clock.now += 3
    metrics.refresh()
    assert figures(metrics)["capo_job_oldest_wait_seconds"] == 3


def test_attempts_that_are_forgiven_stay_counted(place: Place) -> None:
    """A counter that went down would look like a restart to Prometheus, and a rate would leap."""
    queue, metrics = WorkQueue(place.database), JobMetrics(place.database)
    job = place.queue_job(add_file_row(place.file_rows))
    counted = []
    for _ in range(3):
        claimed = queue.claim(place.store.job(job.id), owner="worker", lease_seconds=30)
        assert claimed is not None
        queue.requeue(claimed, "the worker stopped", reason="worker_stopping", counts=False)
        metrics.refresh()
        counted.append(figures(metrics)["capo_job_attempts_total"])
    assert counted == [1, 2, 3]
    assert place.store.job(job.id).attempts == 0


def test_an_ended_job_leaves_no_series_of_its_own(place: Place) -> None:
    queue = WorkQueue(place.database)
    job = place.queue_job(add_file_row(place.file_rows))
    claimed = queue.claim(job, owner="worker", lease_seconds=30)
    assert claimed is not None
    metrics = JobMetrics(place.database)
    metrics.refresh()
    assert any(job.id in name for name in figures(metrics))
    queue.fail(claimed, JobError("invalid_data", "line 3"))
    metrics.refresh()
    assert not any(job.id in name for name in figures(metrics))


def test_a_store_that_is_away_keeps_the_figures_and_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.queue_job(add_file_row(place.file_rows))
    metrics = JobMetrics(place.database)
    metrics.refresh()

    def away() -> None:
        raise UnavailableError("the job store does not answer")

    monkeypatch.setattr(place.database, "read", away)
    metrics.refresh()
    found = figures(metrics)
    assert found["capo_job_store_up"] == 0
    assert found['capo_jobs{status="queued"}'] == 1


async def test_a_bug_while_the_store_is_read_is_logged_and_it_is_read_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tune.jobs.metrics.REFRESH_SECONDS", 0.01)
    metrics = JobMetrics(place.database)
    metrics.refresh()
    following = asyncio.create_task(metrics.follow())
    try:
        with monkeypatch.context() as broken:
            broken.setattr("tune.jobs.metrics._read", lambda *_: [][1])
            await eventually(lambda: "list index out of range" in caplog.text)
            assert figures(metrics)["capo_job_store_up"] == 0
        await eventually(lambda: figures(metrics)["capo_job_store_up"] == 1)
    finally:
        following.cancel()


def test_a_message_is_overdue_since_it_was_due_and_not_while_it_waits_for_its_next_try(place: Place) -> None:
    clock = Clock()
    EndpointStore(place.database, tenant=TENANT).create(name="n", url="http://127.0.0.1:9", event_types=EVENT_TYPES)
    store = JobStore(place.database, tenant=TENANT, clock=clock)
    metrics, outbox = JobMetrics(place.database, clock=clock), Outbox(place.database, clock=clock)

    def waiting_and_overdue() -> tuple[float, float]:
        metrics.refresh()
        found = figures(metrics)
        return found["capo_webhook_deliveries_waiting"], found["capo_webhook_overdue_seconds"]

    assert waiting_and_overdue() == (0, 0)
    store.cancel(store.create_job(new_job(add_file_row(place.file_rows))).id)
    assert waiting_and_overdue() == (1, 0)
    clock.now += 40
    assert waiting_and_overdue() == (1, 40)
    (taken,) = outbox.take_due({}, per_endpoint=1, for_seconds=60)
    assert outbox.failed(taken, "it answered 500")
    assert waiting_and_overdue() == (1, 0)
    clock.now += 7
    assert waiting_and_overdue() == (1, 2), "after 5 seconds it was due again"
    (taken,) = outbox.take_due({}, per_endpoint=1, for_seconds=60)
    outbox.delivered(taken)
    assert waiting_and_overdue() == (0, 0)
