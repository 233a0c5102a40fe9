"""kill -9 of the worker, of the service, or of both, at random moments of a job's life: it succeeds all the same, with
the same result, one artifact, and one set of events in order."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from pathlib import Path

import openai
import psutil

from tests.sizes import size
from tests.soak import job_service
from tests.soak.figures import Figures
from tests.soak.job_service import STEPS, JobService, final_state
from tests.tune.jobs.support import BASE, TENANT, chat_rows, wait_until
from tune.jobs.database import Database
from tune.jobs.file_store import FileStore
from tune.jobs.records import EventRecord
from tune.jobs.store import JobStore

KILLS = size(3, 50)
LIFE_SECONDS = 1.2
"""From a job's claim to its end, if nobody is killed."""
WAITING_SHARE = 0.2
"""Of the kills hit the job before it is claimed, or at about that time."""
VICTIMS = ("worker", "service", "both")


def kill(service: JobService, victim: str) -> None:
    workers = service.workers() if victim != "service" else []
    if victim != "worker":
        service.process.kill()
        service.process.wait()
    for process in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def create(client: openai.OpenAI, training_file: str) -> str:
    extension = {"capo": {"checkpoint_every_steps": 3}}
    return client.fine_tuning.jobs.create(model=BASE, training_file=training_file, extra_body=extension).id


def wait_for_the_claim(client: openai.OpenAI, job_id: str) -> None:
    deadline = time.monotonic() + 60
    while client.fine_tuning.jobs.retrieve(job_id).status == "queued":
        assert time.monotonic() < deadline, f"nobody takes {job_id}"
        time.sleep(0.02)


def wait_for_the_end(client: openai.OpenAI, job_id: str) -> str:
    deadline = time.monotonic() + 60
    while (status := client.fine_tuning.jobs.retrieve(job_id).status) not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < deadline, f"{job_id} is still {status}"
        time.sleep(0.05)
    return status


def check_events(events: list[EventRecord]) -> None:
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert len({event.id for event in events}) == len(events)
    messages = Counter(event.message for event in events)
    assert messages["The job has successfully completed"] == 1
    assert events[-1].message == "The job has successfully completed"
    assert events[0].message.startswith("Created fine-tuning job")
    steps = [event.data["step"] for event in events if event.kind == "metrics" and event.data is not None]
    assert steps == list(range(1, STEPS + 1)), "each step is told of once and in order, however often it was repeated"


def test_a_job_survives_every_kill(tmp_path: Path, figures: Figures) -> None:
    chance = random.Random(20261121)
    service = job_service.start(tmp_path, workers=1)
    longest = 0.0
    killed: Counter[str] = Counter()
    attempts: Counter[int] = Counter()
    try:
        with service.client() as client:
            training_file = client.files.create(file=("rows.jsonl", chat_rows(12)), purpose="fine-tune").id
        for number in range(KILLS):
            victim = VICTIMS[number % len(VICTIMS)]
            port = int(service.url.rpartition(":")[2])
            with service.client() as client:
                job_id = create(client, training_file)
                if chance.random() > WAITING_SHARE:
                    wait_for_the_claim(client, job_id)
            time.sleep(chance.uniform(0.0, LIFE_SECONDS))
            killed_at = time.monotonic()
            kill(service, victim)
            killed[victim] += 1
            if victim != "worker":
                service = job_service.start(tmp_path, workers=1, port=port)
            with service.client() as client:
                assert wait_for_the_end(client, job_id) == "succeeded"
            longest = max(longest, time.monotonic() - killed_at)
            attempts[_check(service, job_id)] += 1
    finally:
        job_service.stop(service)
    figures.record(
        "kills of jobs",
        kills=KILLS,
        victims=", ".join(f"{name} {count}" for name, count in sorted(killed.items())),
        attempts=", ".join(f"{count} jobs in {number}" for number, count in sorted(attempts.items())),
        longest_recovery_seconds=longest,
    )


def _check(service: JobService, job_id: str) -> int:
    """Everything the job left behind, read beside the service; its attempts."""
    database = Database(service.database_url)
    store = JobStore(database, tenant=TENANT)
    job = store.job(job_id)
    artifacts = [artifact for artifact in service.registry.artifacts() if artifact.manifest.job_id == job_id]
    assert [artifact.revision for artifact in artifacts] == [job.revision]
    assert (artifacts[0].path / "state.txt").read_text() == final_state()
    assert service.registry.resolve(job.reserved_name).revision == job.revision
    check_events(store.events_since(job_id, 0))
    (result,) = job.result_files
    assert FileStore(database, tenant=TENANT).get(result).purpose == "fine-tune-results"
    lines = (service.directory / "data" / "files" / result).read_text().splitlines()
    assert [int(line.partition(",")[0]) for line in lines[1:]] == list(range(1, STEPS + 1))
    # After the job has ended; by the next worker, if this one was killed in between.
    wait_until(lambda: not (service.directory / "data" / "jobs" / job_id).exists(), seconds=20)
    database.close()
    return job.attempts
