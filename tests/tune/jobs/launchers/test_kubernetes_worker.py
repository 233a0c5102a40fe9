"""The whole way of a job through Kubernetes, but for Kubernetes: what is launched is a worker that finds its job."""

from __future__ import annotations

from pathlib import Path

import pytest

from capo.cli.serve import read_settings
from capo.workers import make_launcher
from registry import Registry
from tests.tune.jobs.launchers.kubelet import run_pod
from tests.tune.jobs.launchers.kubernetes_server import running_api_server
from tests.tune.jobs.support import Place, chat_rows
from tune.jobs.launchers.dispatch import ClusterLauncher
from tune.jobs.launchers.kubernetes_api import KubernetesAccess
from tune.jobs.records import Hyperparameters


@pytest.mark.training
async def test_a_job_is_launched_worked_by_what_the_manifest_says_and_succeeds(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, account = tmp_path / "secret", tmp_path / "account"
    secret.mkdir()
    (secret / "CAPO_DATABASE_URL").write_text(place.database_url)
    with running_api_server(account) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        access = KubernetesAccess.in_cluster(account)
        monkeypatch.setattr(KubernetesAccess, "in_cluster", lambda: access)
        settings = read_settings(
            launcher="kubernetes",
            kubernetes_image="registry.example.com/capo:1",
            kubernetes_volume_claim="capo-data",
            kubernetes_secret="capo-secrets",
            database_url=place.database_url,
            data_dir=place.data_dir,
            worker_threads=1,
        )
        launcher = make_launcher(settings, {}, place.database)
        assert isinstance(launcher, ClusterLauncher)
        job = place.queue_job(
            place.upload(chat_rows(12)).id,
            hyperparameters=Hyperparameters(n_epochs=1, batch_size=4, learning_rate_multiplier=1.0),
        )
        launcher.step()
        ((name, manifest),) = server.jobs.items()
        volumes = {"capo-data": place.data_dir, "capo-secrets": secret}
        assert run_pod(manifest, volumes=volumes, timeout_seconds=300) == 0
        server.succeeded(name)
        launcher.step()
        await launcher.stop()
    done = place.store.job(job.id)
    assert (done.status, done.attempts, done.error) == ("succeeded", 1, None)
    assert done.fine_tuned_model is not None
    artifact = Registry(place.data_dir / "registry").resolve(done.fine_tuned_model)
    assert (artifact.manifest.job_id, artifact.revision) == (job.id, done.revision)
    assert list(server.jobs) == [name], "it stays for an hour, to be looked at, and is not launched again"
