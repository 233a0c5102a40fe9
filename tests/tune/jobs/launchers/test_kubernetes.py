"""Training jobs as Jobs of Kubernetes: what is asked of the API server, what its answers mean, and the Jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from registry.errors import InvalidRequestError
from tests.tune.jobs.launchers.kubernetes_server import ApiServer, running_api_server
from tests.tune.jobs.launchers.test_cluster_launcher import Scene
from tests.tune.jobs.support import Place
from tune.jobs.launchers.cluster import Launch, LaunchRefusedError, launch_name
from tune.jobs.launchers.dispatch import ClusterLauncher
from tune.jobs.launchers.kubernetes import KubernetesCluster
from tune.jobs.launchers.kubernetes_api import KubernetesAccess
from tune.jobs.launchers.kubernetes_job import KubernetesSettings, job_manifest
from tune.jobs.store import JobStore

SETTINGS = KubernetesSettings(
    image="registry.example.com/capo@sha256:" + "0" * 64,
    volume_claim="capo-data",
    secret="capo-secrets",
    environment={"CAPO_MODEL": "capo-tiny"},
)
JOB_ID = "ftjob-abcdefghijklmnopqrstuvwx"
NAME = launch_name(JOB_ID, 0)


@pytest.fixture
def account_dir(tmp_path: Path) -> Path:
    return tmp_path / "serviceaccount"


@pytest.fixture
def server(account_dir: Path) -> Iterator[ApiServer]:
    with running_api_server(account_dir) as running:
        yield running


@pytest.fixture
def cluster(server: ApiServer, account_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesCluster]:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    opened = KubernetesCluster(KubernetesAccess.in_cluster(account_dir), SETTINGS)
    yield opened
    opened.close()


def launch(cluster: KubernetesCluster, job_id: str = JOB_ID, epoch: int = 0) -> str:
    name = launch_name(job_id, epoch)
    cluster.launch(name, job_id=job_id, tenant="acme", gpus=0)
    return name


class TestTheApi:
    def test_a_job_is_made_once_however_often_it_is_launched(
        self, server: ApiServer, cluster: KubernetesCluster
    ) -> None:
        launch(cluster)
        launch(cluster)  # answered with 409
        assert list(server.jobs) == [NAME]
        assert cluster.launches() == [Launch(NAME, JOB_ID, "waiting")]

    def test_every_page_of_a_list_is_read(self, cluster: KubernetesCluster) -> None:
        names = [launch(cluster, f"ftjob-{number:024d}") for number in range(5)]
        assert [given.name for given in cluster.launches()] == names

    def test_jobs_of_others_are_not_looked_at(self, server: ApiServer, cluster: KubernetesCluster) -> None:
        server.jobs["backup"] = {"metadata": {"name": "backup", "labels": {"app": "backup"}}}
        assert cluster.launches() == []

    @pytest.mark.parametrize(
        ("status", "reason"),
        [
            ({}, None),
            (
                {"containerStatuses": [{"name": "worker", "state": {"waiting": {"reason": "ContainerCreating"}}}]},
                None,
            ),
            (
                {"containerStatuses": [{"name": "worker", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]},
                "its pod cannot start: ImagePullBackOff",
            ),
            (
                {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]},
                "its pod finds no place: Unschedulable",
            ),
        ],
    )
    def test_a_pod_that_does_not_start_says_why(
        self, server: ApiServer, cluster: KubernetesCluster, status: dict[str, Any], reason: str | None
    ) -> None:
        server.pod_waits(launch(cluster), status)
        assert cluster.launches() == [Launch(NAME, JOB_ID, "waiting", reason)]

    def test_running_and_ended_jobs_are_told_apart(self, server: ApiServer, cluster: KubernetesCluster) -> None:
        name = launch(cluster)
        server.runs(name)
        assert cluster.launches() == [Launch(NAME, JOB_ID, "running")]
        server.succeeded(name)
        assert cluster.launches() == [Launch(NAME, JOB_ID, "ended")]
        server.pod_ended(name, reason="OOMKilled", exit_code=137)
        assert cluster.launches() == [Launch(NAME, JOB_ID, "ended", "its worker ended with OOMKilled (exit code 137)")]

    def test_a_job_being_deleted_counts_as_gone(self, server: ApiServer, cluster: KubernetesCluster) -> None:
        server.jobs[launch(cluster)]["metadata"]["deletionTimestamp"] = "2026-11-21T06:00:00Z"
        assert cluster.launches() == []

    def test_removing_takes_the_pods_along_and_what_is_gone_is_gone(
        self, server: ApiServer, cluster: KubernetesCluster
    ) -> None:
        launch(cluster)
        (made,) = cluster.launches()
        cluster.remove(made)
        assert server.jobs == {}
        cluster.remove(made)  # answered with 404

    @pytest.mark.parametrize(
        ("code", "reason", "headers", "seconds"),
        [
            (403, "Forbidden", {}, None),
            (429, "TooManyRequests", {"retry-after": "9"}, 9.0),
            (500, "Internal", {}, None),
        ],
    )
    def test_a_refusal_carries_the_servers_words_and_when_to_come_again(
        self,
        server: ApiServer,
        cluster: KubernetesCluster,
        code: int,
        reason: str,
        headers: dict[str, str],
        seconds: float | None,
    ) -> None:
        server.refuse(code, reason, "jobs.batch is forbidden: exceeded quota", **headers)
        with pytest.raises(LaunchRefusedError, match=f"{code}.*exceeded quota") as refused:
            launch(cluster)
        assert refused.value.retry_after_seconds == seconds
        assert server.jobs == {}

    def test_a_token_that_kubernetes_replaces_is_read_anew(
        self, server: ApiServer, cluster: KubernetesCluster, account_dir: Path
    ) -> None:
        server.token = "the-next-one"
        with pytest.raises(LaunchRefusedError, match="401"):
            cluster.launches()
        (account_dir / "token").write_text("the-next-one")
        assert cluster.launches() == []

    def test_a_server_with_another_certificate_gets_no_token(
        self, server: ApiServer, tmp_path: Path, account_dir: Path
    ) -> None:
        with running_api_server(tmp_path / "impostor") as impostor:
            access = KubernetesAccess(
                f"https://127.0.0.1:{impostor.port}", "capo", account_dir / "token", account_dir / "ca.crt"
            )
            deceived = KubernetesCluster(access, SETTINGS)
            with pytest.raises(LaunchRefusedError, match="no answer"):
                deceived.launches()
            deceived.close()
            assert impostor.seen == []

    def test_outside_of_a_pod_the_launcher_says_what_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match="automountServiceAccountToken"):
            KubernetesAccess.in_cluster(tmp_path)


class TestWithTheLauncher:
    """The dispatcher over the real API on a real socket."""

    @pytest.fixture
    def scene(self, place: Place, cluster: KubernetesCluster) -> Scene:
        scene = Scene(place)
        scene.launcher = ClusterLauncher(
            cluster, scene.queue, JobStore(place.database), max_launched=10, clock=lambda: scene.now
        )
        return scene

    def test_a_refused_launch_is_made_later(self, server: ApiServer, scene: Scene) -> None:
        job = scene.queued()
        server.refuse(200, "", "")  # the list, which then holds nothing
        server.refuse(403, "Forbidden", "no rights yet")
        scene.launcher.step()
        assert server.jobs == {}
        assert scene.notes(job) == ["The job waits for its worker: the cluster takes none just now"]
        scene.now = 6
        scene.launcher.step()
        assert list(server.jobs) == [launch_name(job.id, 0)]

    def test_a_job_that_vanished_before_its_worker_began_is_launched_again(
        self, server: ApiServer, scene: Scene
    ) -> None:
        job = scene.queued()
        scene.launcher.step()
        server.vanish(launch_name(job.id, 0))
        scene.launcher.step()
        assert list(server.jobs) == [launch_name(job.id, 0)]

    def test_one_that_vanished_under_its_worker_is_replaced_after_the_lease(
        self, server: ApiServer, scene: Scene
    ) -> None:
        job = scene.queued()
        scene.launcher.step()
        taken = scene.queue.claim(job, owner="pod", lease_seconds=30)
        assert taken is not None
        server.runs(launch_name(job.id, 0))
        scene.launcher.step()
        server.vanish(launch_name(job.id, 0))
        scene.launcher.step()
        assert server.jobs == {}
        scene.now = 31
        scene.launcher.step()
        assert list(server.jobs) == [launch_name(job.id, 1)]

    def test_a_pod_killed_before_it_began_is_replaced_and_the_job_says_why(
        self, server: ApiServer, scene: Scene
    ) -> None:
        job = scene.queued()
        scene.launcher.step()
        server.pod_ended(launch_name(job.id, 0), reason="OOMKilled", exit_code=137)
        scene.launcher.step()
        scene.now = 6
        scene.launcher.step()
        assert server.jobs[launch_name(job.id, 0)]["status"] == {}
        assert scene.notes(job) == ["The job waits for its worker: its worker ended with OOMKilled (exit code 137)"]


class TestTheManifest:
    @pytest.mark.parametrize("version", ["1.30", "1.33", "1.36"])
    @pytest.mark.parametrize("gpus", [0, 2])
    def test_it_is_valid_to_the_letter(self, version: str, gpus: int) -> None:
        manifest = job_manifest(SETTINGS, NAME, job_id=JOB_ID, tenant="acme", gpus=gpus)
        kubernetes_validate.validate(manifest, version, strict=True)
        manifest["spec"]["template"]["spec"]["restartPolice"] = "Never"
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(manifest, version, strict=True)

    def test_it_is_restricted_as_pod_security_standards_ask(self) -> None:
        """https://kubernetes.io/docs/concepts/security/pod-security-standards/, the profile restricted."""
        pod = job_manifest(SETTINGS, NAME, job_id=JOB_ID, tenant="acme", gpus=0)["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"]
        allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
        assert all(volume.keys() - {"name"} <= allowed | {"secret"} for volume in pod["volumes"])
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert pod["automountServiceAccountToken"] is False
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    def test_kubernetes_itself_repeats_nothing_and_forgets_in_time(self) -> None:
        spec = job_manifest(SETTINGS, NAME, job_id=JOB_ID, tenant="acme", gpus=0)["spec"]
        assert (spec["backoffLimit"], spec["template"]["spec"]["restartPolicy"]) == (0, "Never")
        assert spec["ttlSecondsAfterFinished"] > 0

    def test_it_works_the_one_job_with_what_that_needs(self) -> None:
        manifest = job_manifest(SETTINGS, NAME, job_id=JOB_ID, tenant="acme", gpus=2)
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        assert container["args"] == ["worker", "--job", JOB_ID, "--gpus", "2"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"

    def test_nothing_secret_stands_in_it(self) -> None:
        manifest = job_manifest(SETTINGS, NAME, job_id=JOB_ID, tenant="acme", gpus=0)
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        assert "CAPO_DATABASE_URL" not in {entry["name"] for entry in container["env"]}

    @pytest.mark.parametrize("tenant", ["acme", "a b/c", "x" * 100, "-dash-", "ümläut"])
    def test_any_tenant_gives_a_valid_label(self, tenant: str) -> None:
        label = job_manifest(SETTINGS, NAME, job_id=JOB_ID, tenant=tenant, gpus=0)["metadata"]["labels"]["capo/tenant"]
        assert len(label) <= 63
        assert label[0].isalnum()
        assert label[-1].isalnum()
        assert label.isascii()
