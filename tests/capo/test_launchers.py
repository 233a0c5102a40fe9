"""Which launcher the settings choose, and what it tells the workers."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from capo.cli.serve import read_settings
from capo.settings import Settings
from capo.workers import cluster_environment, make_launcher, max_gpus
from registry.errors import InvalidRequestError
from tests.serve.running import eventually
from tests.tune.jobs.launchers.kubernetes_server import ApiServer, running_api_server
from tests.tune.jobs.support import add_file_row, new_job
from tune.jobs.database import Database
from tune.jobs.file_store import FileStore
from tune.jobs.gpus import visible_gpus
from tune.jobs.launchers.dispatch import ClusterLauncher
from tune.jobs.launchers.kubernetes_api import KubernetesAccess
from tune.jobs.launchers.local import LocalLauncher
from tune.jobs.store import JobStore

KUBERNETES = {
    "launcher": "kubernetes",
    "kubernetes_image": "registry.example.com/capo:1",
    "kubernetes_volume_claim": "capo-data",
    "database_url": "postgresql+psycopg://capo:secret@postgres/capo",
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return read_settings(data_dir=tmp_path)


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    opened = Database(settings.job_store_url)
    yield opened
    opened.close()


def test_workers_are_local_processes_unless_told_otherwise(settings: Settings, database: Database) -> None:
    assert isinstance(make_launcher(settings, {}, database), LocalLauncher)
    assert isinstance(make_launcher(settings, {}, None), LocalLauncher), "a replica without jobs launches nothing"


async def test_a_local_worker_that_cannot_be_started_again_is_tried_until_it_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tune.jobs.launchers.local._RESTART_PAUSE_SECONDS", 0.05)
    launcher = LocalLauncher(["sleep", "60"], [os.environ])
    launcher.start()
    watching = asyncio.create_task(launcher.watch())
    try:
        first = launcher._processes[0]
        with monkeypatch.context() as broken:
            broken.setattr(launcher, "_command", ["/no/such/program"])
            first.kill()
            await eventually(lambda: "could not be started" in caplog.text)
        await eventually(lambda: launcher._processes[0] is not first)
    finally:
        watching.cancel()
        await launcher.stop()


def test_local_workers_are_started_with_different_gpus(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    started: list[str] = []
    monkeypatch.setattr(
        "tune.jobs.launchers.local.subprocess.Popen",
        lambda command, env, stdin: started.append(env["CUDA_VISIBLE_DEVICES"]),
    )
    make_launcher(read_settings(data_dir=tmp_path, workers=2), {"CUDA_VISIBLE_DEVICES": "0,1"}, database).start()
    assert started == ["0", "1"]


async def test_what_a_worker_may_take_to_stop_is_told_to_it_and_waited_for(tmp_path: Path, database: Database) -> None:
    settings = read_settings(data_dir=tmp_path, worker_stop_seconds=1.5)
    launcher = make_launcher(settings, dict(os.environ), database)
    assert isinstance(launcher, LocalLauncher)
    told = tmp_path / "told"
    # Ends two seconds after SIGTERM, and says then what it was told.
    script = (
        f'trap "sleep 2; echo $CAPO_WORKER_STOP_SECONDS > {told}; exit" TERM; touch {told}; while :; do sleep 0.1; done'
    )
    launcher._command = ["sh", "-c", script]
    launcher.start()
    await eventually(told.exists)
    await launcher.stop()
    assert told.read_text() == "1.5\n"
    cluster = read_settings(**KUBERNETES, worker_stop_seconds=90)
    assert cluster_environment(cluster)["CAPO_WORKER_STOP_SECONDS"] == "90.0"


@pytest.mark.parametrize("missing", ["kubernetes_image", "kubernetes_volume_claim", "database_url"])
def test_a_launcher_says_what_it_needs(missing: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"needs {missing}.*CAPO_{missing.upper()}"):
        read_settings(**{**KUBERNETES, missing: None})
    with pytest.raises(InvalidRequestError, match="needs ray_address"):
        read_settings(launcher="ray")


def test_local_workers_beside_a_cluster_are_a_contradiction() -> None:
    with pytest.raises(InvalidRequestError, match="workers=2 are local ones"):
        read_settings(launcher="ray", ray_address="http://ray:8265", workers=2)
    assert read_settings(launcher="ray", ray_address="http://ray:8265").num_workers == 0


def test_outside_of_a_pod_kubernetes_is_refused_when_the_service_starts(database: Database) -> None:
    with pytest.raises(InvalidRequestError, match="needs a pod with a service account's token"):
        make_launcher(read_settings(**KUBERNETES), {}, database)


@pytest.mark.parametrize("registry_dir", ["elsewhere", "data/../elsewhere", "database"])
def test_workers_in_kubernetes_cannot_publish_outside_of_the_volume_they_have(
    tmp_path: Path, database: Database, registry_dir: str
) -> None:
    settings = read_settings(**KUBERNETES, data_dir=tmp_path / "data", registry_dir=tmp_path / registry_dir)
    with pytest.raises(InvalidRequestError, match=r"registry_dir=.*outside of data_dir="):
        make_launcher(settings, {}, database)


async def test_a_waiting_job_becomes_a_job_of_kubernetes_that_knows_no_secret(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = tmp_path / "account"
    with running_api_server(account) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        access = KubernetesAccess.in_cluster(account)
        monkeypatch.setattr(KubernetesAccess, "in_cluster", lambda: access)
        places = {"data_dir": tmp_path, "registry_dir": tmp_path / "team" / "models"}
        settings = read_settings(**KUBERNETES, **places, kubernetes_secret="capo-secrets", kubernetes_memory="3Gi")
        launcher = make_launcher(settings, {}, database)
        assert isinstance(launcher, ClusterLauncher)
        job = JobStore(database, tenant="acme").create_job(new_job(add_file_row(FileStore(database, tenant="acme"))))
        launcher.step()
        _check_manifest(server, job.id)
        await launcher.stop()


def _check_manifest(server: ApiServer, job_id: str) -> None:
    (manifest,) = server.jobs.values()
    text = json.dumps(manifest)
    assert "secret@postgres" not in text
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["CAPO_MODEL"] == "capo-tiny"
    assert environment["CAPO_SECRETS_DIR"]
    (volume,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "data"]
    assert environment["CAPO_DATA_DIR"] == volume
    assert environment["CAPO_REGISTRY_DIR"] == f"{volume}/team/models", "the service's registry, on the same volume"
    assert container["args"][:3] == ["worker", "--job", job_id]
    grace_seconds = manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_seconds > float(environment["CAPO_WORKER_STOP_SECONDS"])
    assert container["resources"]["limits"]["memory"] == "3Gi"


def test_every_variable_that_workers_are_given_is_a_setting(settings: Settings) -> None:
    chosen = read_settings(worker_threads=2, max_running_jobs_per_tenant=3, data_dir=settings.data_dir)
    for name in cluster_environment(chosen):
        assert name.removeprefix("CAPO_").lower() in Settings.model_fields, name


class TestGpus:
    def test_those_that_are_visible_are_counted_without_a_driver(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
            (tmp_path / name).touch()
        assert visible_gpus(tmp_path) == 2
        for chosen, count in (("", 0), ("0", 1), ("0,3", 2), ("1,-1,2", 1), ("GPU-ab, GPU-cd", 2), ("-1", 0)):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
            assert visible_gpus(tmp_path) == count, chosen

    def test_jobs_may_ask_for_what_the_largest_worker_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        assert max_gpus(read_settings()) == 2
        assert max_gpus(read_settings(workers=2)) == 1, "each has one of them"
        assert max_gpus(read_settings(worker_gpus=1)) == 1
        assert max_gpus(read_settings(workers=0)) is None, "workers elsewhere are not known here"
        assert max_gpus(read_settings(launcher="ray", ray_address="http://ray:8265")) == 64
