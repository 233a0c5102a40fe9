"""Training jobs as Jobs of Kubernetes, in the namespace of the control process."""

from __future__ import annotations

from typing import Any

from tune.jobs.launchers.cluster import Launch, LaunchState
from tune.jobs.launchers.kubernetes_api import KubernetesAccess, KubernetesApi
from tune.jobs.launchers.kubernetes_job import JOB_LABEL, SELECTOR, KubernetesSettings, job_manifest


class KubernetesCluster:
    """A :class:`~tune.jobs.launchers.cluster.Cluster`. Needs the rights to create, list and delete Jobs, and to list
    pods."""

    def __init__(self, access: KubernetesAccess, settings: KubernetesSettings) -> None:
        self._api = KubernetesApi(access)
        self._settings = settings

    def close(self) -> None:
        self._api.close()

    def launches(self) -> list[Launch]:
        jobs = [job for job in self._api.jobs(SELECTOR) if "deletionTimestamp" not in job["metadata"]]
        states = {job["metadata"]["name"]: _state(job.get("status") or {}) for job in jobs}
        # Only a pod says why it does not run or what it died of.
        has_questions = any(state != "running" for state in states.values())
        pods = {_job_of(pod): pod for pod in self._api.pods(SELECTOR)} if has_questions else {}
        return [
            Launch(
                name=name,
                job_id=job["metadata"]["labels"][JOB_LABEL],
                state=states[name],
                reason=_reason(pods.get(name), job),
            )
            for job in jobs
            for name in (job["metadata"]["name"],)
        ]

    def launch(self, name: str, *, job_id: str, tenant: str, gpus: int) -> None:
        self._api.create_job(job_manifest(self._settings, name, job_id=job_id, tenant=tenant, gpus=gpus))

    def remove(self, launch: Launch) -> None:
        self._api.delete_job(launch.name)


def _state(status: dict[str, Any]) -> LaunchState:
    """From https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/#JobStatus."""
    for condition in status.get("conditions") or ():
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return "ended"
    return "running" if status.get("ready") else "waiting"


def _job_of(pod: dict[str, Any]) -> str:
    return str((pod["metadata"].get("labels") or {}).get("batch.kubernetes.io/job-name", ""))


def _reason(pod: dict[str, Any] | None, job: dict[str, Any]) -> str | None:
    """The pod's own reason where it has one, else the Job's; in Kubernetes' words, which operators know."""
    status = {} if pod is None else pod.get("status") or {}
    for container in status.get("containerStatuses") or ():
        state = container.get("state") or {}
        ended = state.get("terminated")
        if ended is not None and ended.get("exitCode") != 0:
            return f"its worker ended with {ended.get('reason', 'Error')} (exit code {ended.get('exitCode')})"
        reason = (state.get("waiting") or {}).get("reason")
        if reason is not None and reason not in ("ContainerCreating", "PodInitializing"):
            return f"its pod cannot start: {reason}"
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"its pod finds no place: {condition.get('reason', 'Unschedulable')}"
    for condition in (job.get("status") or {}).get("conditions") or ():
        if condition["type"] == "Failed" and condition["status"] == "True":
            return f"its Job failed: {condition.get('reason', 'Failed')}"
    return None
