"""Two worker processes and many short jobs, on either database: each is worked exactly once, none is lost, and they
come by priority."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.sizes import size
from tests.soak.figures import Figures
from tests.tune.jobs import standins
from tests.tune.jobs.postgres import new_database, running_postgres
from tests.tune.jobs.support import Place, chat_rows, open_place, wait_until
from tests.tune.jobs.test_jobs_worker import worker
from tune.jobs.rows import new_id

JOBS = size(20, 200)
WORKERS = 2
PRIORITIES = (-5, 0, 0, 7)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        url = None
        if request.param == "postgresql":
            url = new_database(stack.enter_context(running_postgres()), new_id("queue_", 8))
        opened = open_place(tmp_path, database_url=url)
        stack.callback(opened.database.close)
        yield opened


def test_each_job_is_worked_once_and_they_come_by_priority(
    place: Place, figures: Figures, request: pytest.FixtureRequest
) -> None:
    chance = random.Random(7)
    training_file = place.upload(chat_rows(12)).id
    jobs = [place.queue_job(training_file, priority=chance.choice(PRIORITIES)) for _ in range(JOBS)]
    started = time.monotonic()
    with ExitStack() as stack:
        for _ in range(WORKERS):
            stack.enter_context(worker(place, standins.trains_well, lease_seconds=30.0, poll_seconds=0.05))
        wait_until(lambda: place.store.job(jobs[-1].id).status != "queued", seconds=300)
        wait_until(lambda: all(place.store.job(job.id).status == "succeeded" for job in jobs), seconds=300)
    seconds = time.monotonic() - started
    begun = standins.attempts(place.directory)
    assert sorted(begun) == sorted(job.id for job in jobs)
    ended = [place.store.job(job.id) for job in jobs]
    assert {(job.attempts, job.epoch) for job in ended} == {(1, 1)}
    owners = {artifact.manifest.job_id for artifact in place.registry.artifacts()}
    assert owners == {job.id for job in jobs}
    assert len(place.registry.artifacts()) == JOBS
    # Claims come strictly in order; a stand-in begins some milliseconds later, on a busy machine many, so that what the
    # other worker claims meanwhile comes before it.
    expected = [job.id for job in sorted(jobs, key=lambda job: -job.priority)]
    displaced = sum(abs(begun.index(job_id) - expected.index(job_id)) for job_id in expected)
    assert displaced < JOBS, "by less than one place each"
    for job in jobs:
        sequence = [event.sequence for event in place.store.events_since(job.id, 0)]
        assert sequence == list(range(1, len(sequence) + 1))
    figures.record(f"queue {request.node.callspec.id}", jobs=JOBS, workers=WORKERS, seconds=seconds)
