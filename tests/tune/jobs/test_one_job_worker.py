"""Workers that a launcher starts for one job: they claim that job and no other, and end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import pytest

from tests.tune.jobs import standins
from tests.tune.jobs.support import Place, chat_rows, wait_until
from tests.tune.jobs.test_jobs_worker import children, messages, settings_for, wait_for, wait_for_attempts, worker
from tune.jobs.worker import run_worker


@pytest.fixture
def training_file(place: Place) -> str:
    return place.upload(chat_rows(20)).id


@contextmanager
def one_job_worker(place: Place, job_id: str, train: Callable[..., Any], **changes: Any) -> Iterator[BaseProcess]:
    """Killed in the end if it has not ended by itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tune.jobs.worker", "tests.tune.jobs.standins"])
    process = context.Process(target=run_worker, args=(settings_for(place, job_id=job_id, **changes), train))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def ended(process: BaseProcess, *, seconds: float = 10) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "the worker still runs"
    return process.exitcode


def test_it_works_its_job_and_no_other_and_ends(place: Place, training_file: str) -> None:
    first, mine = place.queue_job(training_file), place.queue_job(training_file)
    with one_job_worker(place, mine.id, standins.trains_well) as process:
        assert ended(process) == 0
    assert place.store.job(mine.id).status == "succeeded"
    assert place.store.job(first.id).status == "queued"
    assert standins.attempts(place.directory) == [mine.id]


def test_of_two_for_the_same_job_one_works_it(place: Place, training_file: str) -> None:
    job = place.queue_job(training_file)
    with (
        one_job_worker(place, job.id, standins.trains_well) as one,
        one_job_worker(place, job.id, standins.trains_well) as other,
    ):
        assert [ended(one), ended(other)] == [0, 0]
    assert standins.attempts(place.directory) == [job.id]
    assert (place.store.job(job.id).status, place.store.job(job.id).epoch) == ("succeeded", 1)


def test_it_makes_one_attempt_and_leaves_the_next_to_another(place: Place, training_file: str) -> None:
    job = place.queue_job(training_file)
    with one_job_worker(place, job.id, standins.is_killed_once) as process:
        assert ended(process) == 0
    assert (place.store.job(job.id).status, place.store.job(job.id).attempts) == ("queued", 1)
    last = place.store.events_since(job.id, 0)[-1]
    assert (last.level, last.data) == ("warn", {"reason": "training_lost"})
    with one_job_worker(place, job.id, standins.is_killed_once) as process:
        assert ended(process) == 0
    assert place.store.job(job.id).status == "succeeded"


@pytest.mark.parametrize("state", ["cancelled", "paused", "unknown"])
def test_it_ends_at_once_where_there_is_nothing_to_do(place: Place, training_file: str, state: str) -> None:
    job_id = place.queue_job(training_file).id
    if state == "cancelled":
        place.store.cancel(job_id)
    elif state == "paused":
        place.store.pause(job_id)
    else:
        job_id = "ftjob-nothing"
    with one_job_worker(place, job_id, standins.trains_well, lease_seconds=60.0) as process:
        assert ended(process, seconds=5) == 0
    assert standins.attempts(place.directory) == []


def test_it_takes_over_a_job_whose_worker_was_lost(place: Place, training_file: str) -> None:
    job = place.queue_job(training_file)
    with one_job_worker(place, job.id, standins.takes_long) as lost:
        wait_for_attempts(place, 1)
        lost.kill()
        lost.join()
    with one_job_worker(place, job.id, standins.trains_well) as process:
        assert ended(process) == 0
    assert (place.store.job(job.id).status, place.store.job(job.id).attempts) == ("succeeded", 2)
    assert "The worker that had the job was lost; another one takes it over" in messages(place, job.id)


def test_it_does_not_take_a_job_from_a_living_worker_and_gives_up(place: Place, training_file: str) -> None:
    job = place.queue_job(training_file)
    with worker(place, standins.takes_long, stop_grace_seconds=8.0):
        wait_for_attempts(place, 1)
        with one_job_worker(place, job.id, standins.trains_well, lease_seconds=0.3) as process:
            assert ended(process) == 0
        assert place.store.job(job.id).epoch == 1
        place.store.cancel(job.id)
        wait_for(place, job.id, "cancelled")


def test_a_job_that_needs_more_gpus_than_it_has_is_left_alone(place: Place, training_file: str) -> None:
    job = place.queue_job(training_file, gpus=2)
    with one_job_worker(place, job.id, standins.trains_well, gpus=1, lease_seconds=0.3) as process:
        assert ended(process) == 0
    assert place.store.job(job.id).status == "queued"
    with one_job_worker(place, job.id, standins.trains_in_ranks, gpus=2) as process:
        assert ended(process) == 0
    assert place.store.job(job.id).status == "succeeded"


def test_what_a_stopped_worker_still_trains_is_ended_by_who_takes_over(place: Place, training_file: str) -> None:
    """A whole worker that stands still (a suspended machine, SIGSTOP) holds the job's directory until it is gone."""
    job = place.queue_job(training_file)
    with worker(place, standins.holds_its_directory) as stopped:
        wait_for_attempts(place, 1)
        (child,) = children(stopped.pid)
        assert stopped.pid is not None
        for pid in (child.pid, stopped.pid):
            os.kill(pid, signal.SIGSTOP)
        with one_job_worker(place, job.id, standins.holds_its_directory) as process:
            wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE, seconds=10)
            assert ended(process) == 0
        os.kill(stopped.pid, signal.SIGCONT)
        done = place.store.job(job.id)
        assert (done.status, done.attempts) == ("succeeded", 2)
        time.sleep(0.5)
        assert place.store.job(job.id) == done


def test_a_directory_that_another_process_holds_is_waited_for_without_counting_attempts(
    place: Place, training_file: str
) -> None:
    job = place.queue_job(training_file)
    with worker(place, standins.finds_its_directory_busy, max_attempts=2):
        wait_for_attempts(place, 1)
        waiting = wait_for(place, job.id, "queued")
    assert waiting.attempts == 0
    assert place.store.events_since(job.id, 0)[-1].data == {"reason": "directory_busy"}
