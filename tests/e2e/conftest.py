"""One service for the whole session, and the two adapters of the demo, made through its API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from openai.types.fine_tuning import FineTuningJob

from capo.demo import EXAMPLES, NUM_QUESTIONS, TASKS, Question, read_questions
from registry import Artifact
from tests.e2e.service import Service, running


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # Two workers: the two jobs below train at once.
    with running(tmp_path_factory.mktemp("service"), "--workers", "2") as started:
        yield started


@dataclass(frozen=True)
class Tuned:
    """One task's adapter, as the API made it."""

    job: FineTuningJob
    model: str
    artifact: Artifact
    questions: list[Question]


@pytest.fixture(scope="session")
def tuned(service: Service) -> dict[str, Tuned]:
    """The demo's two jobs, created with the stock SDK and followed to their end."""
    client = service.client
    jobs = {}
    for task in TASKS:
        uploaded = client.files.create(file=EXAMPLES / task / "train.jsonl", purpose="fine-tune")
        jobs[task] = client.fine_tuning.jobs.create(
            model="capo-tiny", training_file=uploaded.id, suffix=task, seed=7
        ).id
    deadline = time.monotonic() + 600
    results = {}
    for task, job_id in jobs.items():
        job = client.fine_tuning.jobs.retrieve(job_id)
        while job.status not in ("succeeded", "failed", "cancelled"):
            assert time.monotonic() < deadline, f"{task} is still {job.status}"
            time.sleep(0.2)
            job = client.fine_tuning.jobs.retrieve(job_id)
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model is not None
        results[task] = Tuned(
            job,
            job.fine_tuned_model,
            service.registry.resolve(job.fine_tuned_model),
            read_questions(EXAMPLES / task / "held_out.jsonl", NUM_QUESTIONS),
        )
    return results
