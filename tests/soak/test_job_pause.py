"""Real training by two warm workers: how soon a job's first step comes, and a job that is paused on one and goes on on
the other ends with the same loss and the same weights."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from registry import Artifact
from tests.sizes import size
from tests.soak.figures import Figures
from tests.tune.jobs.support import BASE, Place, chat_rows, open_place, wait_until
from tests.tune.jobs.test_jobs_worker import settings_for
from tune.jobs.records import Hyperparameters, JobRecord
from tune.jobs.worker import run_worker

pytestmark = pytest.mark.training

PAUSES = size(1, 10)
FIRST_STEP_SECONDS = 5.0
PAUSE_SECONDS = 5.0
NUMBERS = Hyperparameters(n_epochs=size(6, 12), batch_size=8, learning_rate_multiplier=1.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    opened = open_place(tmp_path_factory.mktemp("pause"))
    yield opened
    opened.database.close()


@pytest.fixture(scope="module")
def workers(place: Place) -> Iterator[list[BaseProcess]]:
    """Both import the training stack at the same time; warm once each has worked a job."""
    context = multiprocessing.get_context("spawn")
    settings = settings_for(place, num_threads=1, lease_seconds=60.0, stop_grace_seconds=8.0, poll_seconds=0.1)
    started = [context.Process(target=run_worker, args=(settings,)) for _ in range(2)]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join(20)
            process.kill()


@contextlib.contextmanager
def only(chosen: BaseProcess, workers: list[BaseProcess]) -> Iterator[None]:
    """The others stand still, so that ``chosen`` takes whatever waits."""
    others = [process.pid for process in workers if process is not chosen and process.pid is not None]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


def queue(place: Place, training_file: str) -> JobRecord:
    return place.queue_job(
        training_file, hyperparameters=NUMBERS, extensions={"lora": {"rank": 4, "target_modules": ["q_proj"]}}
    )


def steps(place: Place, job_id: str) -> list[dict[str, Any]]:
    events = place.store.events_since(job_id, 0)
    return [dict(event.data) for event in events if event.kind == "metrics" and event.data is not None]


def wait_for_a_step(place: Place, job_id: str) -> None:
    wait_until(lambda: steps(place, job_id), seconds=60)


def wait_until_it_stops(place: Place, job_id: str) -> None:
    wait_until(lambda: place.store.job(job_id).status != "running", seconds=30)


def ended(place: Place, job_id: str) -> Artifact:
    wait_until(lambda: place.store.job(job_id).status in ("succeeded", "failed"), seconds=180)
    job = place.store.job(job_id)
    assert job.error is None
    return place.registry.resolve(job.reserved_name)


def test_a_warm_worker_takes_a_job_to_its_first_step_in_seconds_and_another_ends_it_as_if_alone(
    place: Place, workers: list[BaseProcess], figures: Figures
) -> None:
    training_file = place.upload(chat_rows(64)).id
    for process in workers:
        with only(process, workers):
            ended(place, queue(place, training_file).id)
    first, second = workers
    with only(first, workers):
        created = time.monotonic()
        alone = queue(place, training_file)
        wait_for_a_step(place, alone.id)
        first_step_seconds = time.monotonic() - created
        whole = ended(place, alone.id)
    final_loss = steps(place, alone.id)[-1]["train_loss"]
    chance = random.Random(3)
    longest = 0.0
    for _ in range(PAUSES):
        with only(first, workers):
            job = queue(place, training_file)
            wait_for_a_step(place, job.id)
            time.sleep(chance.uniform(0.0, 0.5))
            asked = time.monotonic()
            place.store.pause(job.id)
            wait_until_it_stops(place, job.id)
            longest = max(longest, time.monotonic() - asked)
            assert place.store.job(job.id).status == "queued", "it ended before it was paused; make it longer"
        with only(second, workers):
            place.store.resume(job.id)
            resumed = ended(place, job.id)
        told = [int(data["step"]) for data in steps(place, job.id)]
        assert told == list(range(1, len(told) + 1)), "each step once, although two workers made them"
        assert steps(place, job.id)[-1]["train_loss"] == final_loss
        assert _weights(resumed) == _weights(whole)
        assert place.store.job(job.id).attempts == 1
    figures.record(
        f"pause and resume on {BASE}",
        pauses=PAUSES,
        longest_pause_seconds=longest,
        warm_first_step_seconds=first_step_seconds,
    )
    assert longest < PAUSE_SECONDS
    assert first_step_seconds < FIRST_STEP_SECONDS


def _weights(artifact: Artifact) -> bytes:
    return Path(artifact.path / "adapter_model.safetensors").read_bytes()
