"""Pausing and resuming jobs: through the store, and with real worker processes."""

from __future__ import annotations

import time

import openai
import pytest
from openai import OpenAI

from tests.tune.jobs import standins
from tests.tune.jobs.support import Place, add_file_row, chat_rows, wait_until
from tests.tune.jobs.test_jobs_worker import messages, wait_for, wait_for_attempts, worker
from tune.jobs.queue import WorkQueue


@pytest.fixture
def training_file(place: Place) -> str:
    return place.upload(chat_rows(20)).id


def test_a_paused_job_keeps_a_status_that_the_sdk_knows(client: OpenAI, place: Place, training_file: str) -> None:
    job = place.queue_job(training_file)
    paused = client.fine_tuning.jobs.pause(job.id)
    assert type(paused).model_validate_json(paused.to_json(), strict=True).status == "queued"
    assert paused.to_dict()["capo"]["paused"] is True  # type: ignore[index]
    assert client.fine_tuning.jobs.pause(job.id) == paused
    resumed = client.fine_tuning.jobs.resume(job.id)
    assert resumed.to_dict()["capo"]["paused"] is False  # type: ignore[index]
    assert messages(place, job.id)[1:] == ["Fine-tuning job paused", "Fine-tuning job resumed; it is queued again"]


def test_no_worker_takes_a_paused_job_until_it_is_resumed(place: Place) -> None:
    queue = WorkQueue(place.database)
    paused, other = (place.queue_job(add_file_row(place.file_rows)) for _ in range(2))
    place.store.pause(paused.id)
    seen = queue.next_waiting()
    assert seen is not None
    assert seen.id == other.id
    assert queue.claim(paused, owner="me", lease_seconds=60) is None
    place.store.resume(paused.id)
    assert queue.claim(paused, owner="me", lease_seconds=60) is not None


def test_a_paused_job_can_be_cancelled(client: OpenAI, place: Place, training_file: str) -> None:
    job = place.queue_job(training_file)
    place.store.pause(job.id)
    assert client.fine_tuning.jobs.cancel(job.id).to_dict()["capo"]["paused"] is False  # type: ignore[index]


def test_a_job_that_has_ended_is_neither_paused_nor_resumed(client: OpenAI, place: Place, training_file: str) -> None:
    job = place.queue_job(training_file)
    place.store.cancel(job.id)
    for call in (client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.ConflictError) as refused:
            call(job.id)
        assert refused.value.code == "job_already_ended"
        with pytest.raises(openai.NotFoundError):
            call("ftjob-nothing")


def test_a_running_job_stops_within_seconds_and_goes_on_from_its_checkpoint(place: Place, training_file: str) -> None:
    job = place.queue_job(training_file)
    with worker(place, standins.takes_long, stop_grace_seconds=8.0):
        wait_for_attempts(place, 1)
        asked = time.monotonic()
        place.store.pause(job.id)
        paused = wait_for(place, job.id, "queued")
        assert time.monotonic() - asked < 5.0
        assert (paused.paused, paused.owner, paused.attempts) == (True, None, 0)
        assert "Pause requested" in messages(place, job.id)
        assert messages(place, job.id)[-1] == "Fine-tuning job paused"
        time.sleep(0.3)
        assert standins.attempts(place.directory) == [job.id], "nobody takes a paused job"
    checkpoint = place.data_dir / "jobs" / job.id / "checkpoint"
    assert checkpoint.exists()
    with worker(place, standins.is_killed_once):  # trains well, because the checkpoint is there
        time.sleep(0.3)
        assert checkpoint.exists(), "a worker that starts leaves a paused job's checkpoints alone"
        place.store.resume(job.id)
        done = wait_for(place, job.id, "succeeded")
    assert done.fine_tuned_model == job.reserved_name


def test_a_pause_waits_for_the_end_of_a_step_that_is_longer_than_a_cancel_would_wait_and_than_the_lease(
    place: Place, training_file: str
) -> None:
    job = place.queue_job(training_file)
    with worker(place, standins.takes_a_long_step, stop_grace_seconds=20.0, lease_seconds=1.0):
        wait_for_attempts(place, 1)
        place.store.pause(job.id)
        paused = wait_for(place, job.id, "queued")
        assert (paused.epoch, paused.attempts) == (1, 0)
        assert (place.data_dir / "jobs" / job.id / "checkpoint").exists()


def test_a_cancel_does_not_wait_for_as_long_as_the_pause_before_it(place: Place, training_file: str) -> None:
    job = place.queue_job(training_file)
    with worker(place, standins.hangs, stop_grace_seconds=60.0):
        wait_for_attempts(place, 1)
        place.store.pause(job.id)
        time.sleep(0.2)
        place.store.cancel(job.id)
        wait_for(place, job.id, "cancelled", seconds=10)


def test_the_checkpoints_of_a_job_that_is_cancelled_while_it_is_paused_go_without_a_new_worker(
    place: Place, training_file: str
) -> None:
    job, kept = place.queue_job(training_file), place.queue_job(training_file)
    with worker(place, standins.takes_long, stop_grace_seconds=8.0, sweep_seconds=0.1):
        for attempts, paused in enumerate((job, kept), start=1):
            wait_for_attempts(place, attempts)
            place.store.pause(paused.id)
            wait_for(place, paused.id, "queued")
        checkpoints = [place.data_dir / "jobs" / paused.id / "checkpoint" for paused in (job, kept)]
        assert [checkpoint.exists() for checkpoint in checkpoints] == [True, True]
        place.store.cancel(job.id)
        wait_until(lambda: not checkpoints[0].parent.exists(), seconds=5)
        assert checkpoints[1].exists()


def test_a_pause_outlives_the_worker_that_had_the_job(place: Place, training_file: str) -> None:
    job = place.queue_job(training_file)
    with worker(place, standins.takes_long) as first:
        wait_for_attempts(place, 1)
        first.kill()
        first.join()
    place.store.pause(job.id)
    with worker(place, standins.trains_well):
        wait_until(lambda: place.store.job(job.id).status == "queued", seconds=10)
        time.sleep(0.2)
        assert place.store.job(job.id).paused
        assert standins.attempts(place.directory) == [job.id]


def test_the_highest_priority_goes_first_and_then_the_oldest(place: Place) -> None:
    file_id = add_file_row(place.file_rows)
    ids = [place.queue_job(file_id, priority=priority).id for priority in (0, 5, -5, 5)]
    queue = WorkQueue(place.database)
    order = []
    while (seen := queue.next_waiting()) is not None:
        assert queue.claim(seen, owner="me", lease_seconds=60) is not None
        order.append(seen.id)
    assert order == [ids[1], ids[3], ids[0], ids[2]]
