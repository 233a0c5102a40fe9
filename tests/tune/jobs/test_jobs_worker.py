"""Real worker processes with real forks; only the training itself is a stand-in."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import pytest

from registry.errors import ModelNotFoundError
from tests.tune.jobs import standins
from tests.tune.jobs.support import BASE, Place, chat_rows, wait_until
from tune.jobs.records import JobRecord
from tune.jobs.settings import WorkerSettings
from tune.jobs.worker import run_worker

QUICK: dict[str, Any] = {
    "lease_seconds": 1.0,
    "heartbeat_seconds": 0.2,
    "poll_seconds": 0.02,
    "stop_grace_seconds": 0.7,
    "cancel_grace_seconds": 0.7,
    "retry_delay_seconds": 0.01,
}


def settings_for(place: Place, **changes: Any) -> WorkerSettings:
    values = {
        "database_url": place.database_url,
        "data_dir": place.data_dir,
        "registry_dir": place.registry_dir,
        "base_models": {BASE: BASE},
    }
    return WorkerSettings(**(values | QUICK | changes))


@contextmanager
def worker(place: Place, train: Callable[..., Any], **changes: Any) -> Iterator[BaseProcess]:
    """A worker process; stopped with SIGTERM in the end, and expected to obey."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tune.jobs.worker", "tests.tune.jobs.standins"])
    process = context.Process(target=run_worker, args=(settings_for(place, **changes), train))
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join(10)
        stopped = process.exitcode is not None
        process.kill()
        assert stopped, "the worker ignored SIGTERM"


@pytest.fixture
def training_file(place: Place) -> str:
    return place.upload(chat_rows(20)).id


def wait_for(place: Place, job_id: str, *statuses: str, seconds: float = 20) -> JobRecord:
    wait_until(lambda: place.store.job(job_id).status in statuses, seconds=seconds)
    return place.store.job(job_id)


def wait_for_attempts(place: Place, count: int) -> None:
    wait_until(lambda: len(standins.attempts(place.directory)) >= count, seconds=20)


def messages(place: Place, job_id: str) -> list[str]:
    return [event.message for event in place.store.events_since(job_id, 0)]


def children(pid: int | None) -> list[psutil.Process]:
    assert pid is not None
    return psutil.Process(pid).children(recursive=True)


class TestSuccess:
    def test_a_job_is_published_and_named(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file, suffix="support", extensions={"alias": "helper"})
        with worker(place, standins.trains_well):
            done = wait_for(place, job.id, "succeeded", "failed")
        assert done.error is None
        assert done.fine_tuned_model == job.reserved_name
        artifact = place.registry.resolve(job.reserved_name)
        assert artifact.revision == done.revision == place.registry.resolve("helper").revision
        assert artifact.name == "support"
        assert artifact.manifest.job_id == job.id
        assert done.trained_tokens == standins.TOKENS
        assert done.finished_at is not None
        assert done.estimated_finish is None
        assert not (place.data_dir / "jobs" / job.id).exists()

    def test_its_events_tell_the_story_in_order(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.trains_well):
            wait_for(place, job.id, "succeeded")
        assert messages(place, job.id) == [
            f"Created fine-tuning job: {job.id}",
            "Fine-tuning job started",
            "data read",
            "Step 1/3: training loss=2.0000",
            "Step 2/3: training loss=1.0000",
            "Step 3/3: training loss=0.6667, validation loss=1.5000",
            f"New fine-tuned model created: {job.reserved_name}",
            "The job has successfully completed",
        ]
        steps = [event.data for event in place.store.events_since(job.id, 0) if event.kind == "metrics"]
        assert [data["step"] for data in steps if data] == [1, 2, 3]
        assert steps[0] is not None
        assert steps[0]["grad_norm"] is None  # NaN is no JSON
        assert steps[2] is not None
        assert steps[2]["valid_loss"] == steps[2]["full_valid_loss"] == 1.5

    def test_its_result_file_is_a_table_of_the_metrics(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.trains_well):
            done = wait_for(place, job.id, "succeeded")
        (result,) = done.result_files
        record = place.files.file(result)
        assert record.purpose == "fine-tune-results"
        lines = place.files.storage.path(result).read_text().splitlines()
        assert lines[0].startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy")
        assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3"]
        assert lines[3].split(",")[3] == "1.5"

    def test_jobs_are_done_one_after_another_in_order(self, place: Place, training_file: str) -> None:
        jobs = [place.queue_job(training_file).id for _ in range(5)]
        with worker(place, standins.trains_well):
            for job_id in jobs:
                wait_for(place, job_id, "succeeded")
        assert standins.attempts(place.directory) == jobs


class TestFailure:
    def test_bad_data_fails_at_once_and_says_where(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.finds_bad_data):
            failed = wait_for(place, job.id, "failed")
        assert failed.error is not None
        assert (failed.error.code, failed.error.param) == ("invalid_data", "training_file")
        assert "line 4" in failed.error.message
        assert standins.attempts(place.directory) == [job.id]
        assert place.registry.artifacts() == []

    @pytest.mark.parametrize("train", [standins.exits, standins.is_killed, standins.has_a_bug])
    def test_a_job_that_always_crashes_fails_after_three_attempts(
        self, place: Place, training_file: str, train: Callable[..., Any]
    ) -> None:
        job = place.queue_job(training_file)
        with worker(place, train):
            failed = wait_for(place, job.id, "failed")
        assert standins.attempts(place.directory) == [job.id] * 3
        assert failed.error is not None
        assert failed.error.code == "training_process_failed"
        assert "attempt 3 of 3" in failed.error.message
        assert "secret" not in " ".join(messages(place, job.id))

    def test_a_full_disk_is_tried_again_and_named_in_the_end(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.meets_a_full_disk):
            failed = wait_for(place, job.id, "failed")
        assert standins.attempts(place.directory) == [job.id] * 3
        assert failed.error is not None
        assert failed.error.code == "storage_error"

    def test_a_poisoned_job_does_not_hold_up_the_next(self, place: Place, training_file: str) -> None:
        poisoned, good = place.queue_job(training_file), place.queue_job(training_file)
        with worker(place, standins.is_killed_once, retry_delay_seconds=3.0):
            wait_until(lambda: place.store.job(poisoned.id).attempts == 1, seconds=10)
            wait_until(lambda: good.id in standins.attempts(place.directory), seconds=10)
            assert place.store.job(poisoned.id).status == "queued"

    def test_a_job_killed_once_goes_on_from_its_checkpoint(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.is_killed_once):
            done = wait_for(place, job.id, "succeeded", "failed")
        assert done.status == "succeeded"
        assert done.attempts == 2
        assert any("SIGKILL" in message for message in messages(place, job.id))
        told = [event.data for event in place.store.events_since(job.id, 0) if event.kind == "metrics"]
        assert [data["step"] for data in told if data] == [1, 2, 3], "the second attempt repeats the first step"
        lines = place.files.storage.path(done.result_files[0]).read_text().splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3"]

    def test_a_file_changed_behind_our_back_is_not_trained_on(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        place.files.storage.path(training_file).write_bytes(chat_rows(20, first=1))
        with worker(place, standins.trains_well):
            failed = wait_for(place, job.id, "failed")
        assert failed.error is not None
        assert failed.error.code == "file_changed"

    def test_a_worker_without_the_base_says_so(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file, model="other-base")
        with worker(place, standins.trains_well):
            failed = wait_for(place, job.id, "failed")
        assert failed.error is not None
        assert failed.error.code == "model_not_available"


class TestOnePublication:
    def test_a_crash_after_publishing_is_a_success_and_not_a_second_training(
        self, place: Place, training_file: str
    ) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.is_killed_after_publishing):
            done = wait_for(place, job.id, "succeeded", "failed")
        assert done.status == "succeeded"
        assert done.trained_tokens == standins.TOKENS
        assert standins.attempts(place.directory) == [job.id]
        assert len(place.registry.artifacts()) == 1

    def test_a_cancel_after_publishing_comes_too_late(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.publishes_then_hangs):
            wait_for_attempts(place, 1)
            place.store.cancel(job.id)
            done = wait_for(place, job.id, "succeeded", "cancelled")
        assert done.status == "succeeded"
        assert place.registry.resolve(job.reserved_name).revision == done.revision

    @pytest.mark.parametrize("ended_by", ["pause", "pause and cancel", "stop", "kill"])
    def test_what_ends_a_worker_among_its_exports_leaves_a_job_that_succeeded_and_names_those_missing(
        self, place: Place, training_file: str, ended_by: str
    ) -> None:
        job = place.queue_job(training_file, extensions={"exports": [{"kind": "gptq"}, {"kind": "merge"}]})
        with worker(place, standins.makes_one_export_then_hangs) as process:
            wait_for_attempts(place, 1)
            if ended_by.startswith("pause"):
                place.jobs.pause(job.id)
            if ended_by == "pause and cancel":
                place.jobs.cancel(job.id)
            if ended_by == "stop":
                process.terminate()
            if ended_by == "kill":
                process.kill()
                process.join()
                with worker(place, standins.trains_well):
                    wait_for(place, job.id, "succeeded", "failed", "cancelled")
            done = wait_for(place, job.id, "succeeded", "cancelled", "failed")
        assert (done.status, done.fine_tuned_model, done.paused) == ("succeeded", job.reserved_name, False)
        warnings = [event for event in place.store.events_since(job.id, 0) if event.data and "exports" in event.message]
        assert [(event.level, event.data) for event in warnings] == [("warn", {"missing_exports": ["gptq"]})]
        assert standins.attempts(place.directory) == [job.id]

    def test_a_cancel_of_a_lost_job_whose_model_is_published_leaves_its_end_to_the_next_worker(
        self, place: Place, training_file: str
    ) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.publishes_then_hangs, lease_seconds=0.1, heartbeat_seconds=0.05) as lost:
            wait_for_attempts(place, 1)
            lost.kill()
            lost.join()
        time.sleep(0.5)
        assert place.jobs.cancel(job.id).status == "running"
        with worker(place, standins.trains_well):
            done = wait_for(place, job.id, "succeeded", "cancelled")
        assert (done.status, done.fine_tuned_model) == ("succeeded", job.reserved_name)


class TestCancel:
    def test_a_running_job_stops_at_its_next_step(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.takes_long, cancel_grace_seconds=8.0):
            wait_for_attempts(place, 1)
            asked = time.monotonic()
            place.store.cancel(job.id)
            cancelled = wait_for(place, job.id, "cancelled")
            assert time.monotonic() - asked < 2.0
        assert cancelled.fine_tuned_model is None
        assert messages(place, job.id)[-1] == "Fine-tuning job cancelled"
        assert not (place.data_dir / "jobs" / job.id).exists()
        with pytest.raises(ModelNotFoundError):
            place.registry.resolve(job.reserved_name)

    def test_a_deaf_training_process_is_killed(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.hangs) as process:
            wait_for_attempts(place, 1)
            asked = time.monotonic()
            place.store.cancel(job.id)
            wait_for(place, job.id, "cancelled")
            assert time.monotonic() - asked < QUICK["cancel_grace_seconds"] + 2.0
            wait_until(lambda: children(process.pid) == [], seconds=5)

    def test_a_job_cancelled_while_queued_is_never_started(self, place: Place, training_file: str) -> None:
        cancelled, other = place.queue_job(training_file), place.queue_job(training_file)
        place.store.cancel(cancelled.id)
        with worker(place, standins.trains_well):
            wait_for(place, other.id, "succeeded")
        assert standins.attempts(place.directory) == [other.id]


class TestLostWorkers:
    def test_kill_9_of_the_worker_ends_its_child_and_another_takes_over(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.takes_long) as first:
            wait_for_attempts(place, 1)
            (child,) = children(first.pid)
            first.kill()
            first.join()
            wait_until(lambda: not child.is_running(), seconds=5)
        assert place.store.job(job.id).status == "running"
        with worker(place, standins.trains_well):
            done = wait_for(place, job.id, "succeeded")
        assert done.attempts == 2
        assert done.epoch == 2
        assert len(place.registry.artifacts()) == 1

    def test_a_frozen_worker_loses_its_job_after_the_lease_and_its_child_ends_by_itself(
        self, place: Place, training_file: str
    ) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.takes_long) as frozen:
            wait_for_attempts(place, 1)
            (child,) = children(frozen.pid)
            assert frozen.pid is not None
            os.kill(frozen.pid, signal.SIGSTOP)
            froze_at = time.monotonic()
            with worker(place, standins.trains_well):
                done = wait_for(place, job.id, "succeeded")
                assert time.monotonic() - froze_at >= QUICK["lease_seconds"] - QUICK["heartbeat_seconds"]
                # The old child still trains until its next write is refused.
                wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE, seconds=5)
            os.kill(frozen.pid, signal.SIGCONT)
            wait_until(lambda: children(frozen.pid) == [], seconds=5)
            assert frozen.is_alive()
        assert place.store.job(job.id) == done
        assert len(place.registry.artifacts()) == 1

    def test_a_job_lost_with_its_worker_on_the_last_attempt_fails(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.takes_long, max_attempts=1) as first:
            wait_for_attempts(place, 1)
            first.kill()
            first.join()
        with worker(place, standins.trains_well, max_attempts=1):
            failed = wait_for(place, job.id, "failed")
        assert failed.error is not None
        assert "attempt 1 of 1" in failed.error.message
        assert standins.attempts(place.directory) == [job.id]

    def test_sigterm_puts_the_job_back_without_counting_the_attempt(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.takes_long, stop_grace_seconds=8.0) as process:
            wait_for_attempts(place, 1)
            process.terminate()
            process.join(5)
            assert process.exitcode == 0
        put_back = place.store.job(job.id)
        assert (put_back.status, put_back.attempts, put_back.owner) == ("queued", 0, None)
        assert (place.data_dir / "jobs" / job.id / "checkpoint").exists()

    def test_sigterm_waits_for_the_end_of_a_long_step(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.takes_a_long_step, stop_grace_seconds=20.0) as process:
            wait_for_attempts(place, 1)
            process.terminate()
            process.join(9)
            assert process.exitcode == 0
        assert (place.data_dir / "jobs" / job.id / "checkpoint").exists()

    def test_sigterm_with_a_deaf_child_puts_the_job_back_too(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        with worker(place, standins.hangs) as process:
            wait_for_attempts(place, 1)
            process.terminate()
            process.join(5)
            assert process.exitcode == 0
        put_back = place.store.job(job.id)
        assert (put_back.status, put_back.attempts) == ("queued", 0)

    def test_a_worker_dies_with_its_parent(self, place: Place, training_file: str) -> None:
        job = place.queue_job(training_file)
        script = (
            "import os, subprocess, sys, time\n"
            "code = sys.argv[1].replace('PARENT', str(os.getpid()))\n"
            "print(subprocess.Popen([sys.executable, '-c', code]).pid, flush=True)\n"
            "time.sleep(60)\n"
        )
        code = (
            "from pathlib import Path\n"
            "from tests.tune.jobs import standins\n"
            "from tune.jobs.settings import WorkerSettings\n"
            "from tune.jobs.worker import run_worker\n"
            f"run_worker(WorkerSettings(database_url={place.database_url!r}, data_dir=Path({str(place.data_dir)!r}), "
            f"registry_dir=Path({str(place.registry_dir)!r}), base_models={{{BASE!r}: {BASE!r}}}, "
            "parent_pid=PARENT, poll_seconds=0.02, stop_grace_seconds=2.0), standins.takes_long)\n"
        )
        with subprocess.Popen([sys.executable, "-c", script, code], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            orphan = psutil.Process(int(parent.stdout.readline()))
            wait_for_attempts(place, 1)
            family = [orphan, *orphan.children(recursive=True)]
            assert len(family) == 2
            parent.kill()
        gone, alive = psutil.wait_procs(family, timeout=8)
        assert len(gone) == 2, alive
        assert place.store.job(job.id).status == "queued"


class TestManyWorkers:
    def test_two_workers_racing_for_40_jobs_work_each_exactly_once(self, place: Place, training_file: str) -> None:
        jobs = [place.queue_job(training_file).id for _ in range(40)]
        with worker(place, standins.trains_well), worker(place, standins.trains_well):
            for job_id in jobs:
                wait_for(place, job_id, "succeeded", seconds=60)
        assert sorted(standins.attempts(place.directory)) == sorted(jobs)
        assert {place.store.job(job_id).epoch for job_id in jobs} == {1}
        assert len(place.registry.artifacts()) == 40
