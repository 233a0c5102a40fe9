"""Training jobs on a Ray cluster of two nodes: worked there, taken over when lost, ended when cancelled."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.e2e.service import Service, running
from tests.soak.figures import Figures
from tests.soak.ray_cluster import RayNodes, running_ray
from tests.tune.jobs.support import chat_rows

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def ray() -> Iterator[RayNodes]:
    directory = Path(tempfile.mkdtemp(prefix="capo-ray-", dir="/tmp"))
    try:
        with running_ray(directory / "r") as nodes:
            yield nodes
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def service(ray: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CAPO_LAUNCHER", "ray")
        environment.setenv("CAPO_RAY_ADDRESS", ray.address)
        environment.setenv("CAPO_WORKER_THREADS", "1")
        with running(tmp_path_factory.mktemp("service"), "--role", "control") as started:
            yield started


def create(service: Service, *, epochs: int) -> FineTuningJob:
    client = service.client
    file = client.files.create(file=("rows.jsonl", chat_rows(40)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model="capo-tiny",
        training_file=file.id,
        seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs, "batch_size": 8}}},
    )


def wait(service: Service, job_id: str, *statuses: str, seconds: float = 180) -> FineTuningJob:
    deadline = time.monotonic() + seconds
    while (job := service.client.fine_tuning.jobs.retrieve(job_id)).status not in statuses:
        assert time.monotonic() < deadline, f"{job.status}: {messages(service, job_id)}"
        time.sleep(0.2)
    return job


def messages(service: Service, job_id: str) -> list[str]:
    """Of every page, the oldest first."""
    return [event.message for event in service.client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def has_stepped(service: Service, job_id: str) -> bool:
    return any(message.startswith("Step ") for message in messages(service, job_id))


def wait_for_a_step(service: Service, job_id: str, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not has_stepped(service, job_id):
        assert time.monotonic() < deadline, messages(service, job_id)
        time.sleep(0.2)


def ends_on_ray(ray: RayNodes, job_id: str, *, seconds: float = 90) -> dict[str, str]:
    """Status by submission id of everything that was launched for the job, once all of it has ended."""
    deadline = time.monotonic() + seconds
    while True:
        launched = {name: job["status"] for name, job in ray.jobs().items() if job_id in name}
        if not {"PENDING", "RUNNING"} & set(launched.values()):
            return launched
        assert time.monotonic() < deadline, launched
        time.sleep(0.2)


def worker_of(job_id: str) -> psutil.Process:
    """The process ``capo worker --job`` on the node, which Ray has started through a shell."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "worker" in line and job_id in line and "capo" in " ".join(line[:3]):
            return process
    raise AssertionError("no worker of the job runs here")


def test_a_job_is_worked_on_the_second_node(service: Service, ray: RayNodes, figures: Figures) -> None:
    started = time.monotonic()
    job = create(service, epochs=2)
    wait_for_a_step(service, job.id)
    first_step_seconds = time.monotonic() - started
    done = wait(service, job.id, "succeeded", "failed")
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model is not None
    assert service.registry.resolve(done.fine_tuned_model).manifest.job_id == job.id
    assert ends_on_ray(ray, job.id) == {f"capo-{job.id}-0": "SUCCEEDED"}
    workers = {node["raylet"]["nodeId"] for node in ray.nodes() if not node["raylet"].get("isHeadNode")}
    assert ray.jobs()[f"capo-{job.id}-0"]["driver_node_id"] in workers
    figures.record("ray job", first_step_seconds=first_step_seconds)


def test_a_worker_killed_on_its_node_is_replaced_and_the_job_goes_on(service: Service, ray: RayNodes) -> None:
    job = create(service, epochs=40)
    wait_for_a_step(service, job.id)
    worker_of(job.id).kill()
    done = wait(service, job.id, "succeeded", "failed")
    assert done.status == "succeeded", done.error
    assert "The worker that had the job was lost; another one takes it over" in messages(service, job.id)
    assert ends_on_ray(ray, job.id) == {f"capo-{job.id}-0": "FAILED", f"capo-{job.id}-1": "SUCCEEDED"}
    mine = [artifact for artifact in service.registry.artifacts() if artifact.manifest.job_id == job.id]
    assert len([artifact for artifact in mine if artifact.revision == done.to_dict()["capo"]["revision"]]) == 1  # type: ignore[index]


def test_a_cancelled_job_ends_on_its_node(service: Service, ray: RayNodes) -> None:
    job = create(service, epochs=50)
    wait_for_a_step(service, job.id)
    service.client.fine_tuning.jobs.cancel(job.id)
    wait(service, job.id, "cancelled", seconds=15)
    assert ends_on_ray(ray, job.id) == {f"capo-{job.id}-0": "SUCCEEDED"}
