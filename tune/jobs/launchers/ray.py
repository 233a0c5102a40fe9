"""Training jobs as jobs of a Ray cluster, over its Jobs API
(https://docs.ray.io/en/latest/cluster/running-applications/job-submission/rest.html).

Plain HTTP: this process needs no Ray. The cluster's nodes need it, and Capo with the training stack, on their PATH.
Whoever reaches that API may run anything there, so it belongs into a network of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from tune.jobs.launchers.cluster import NAME_PREFIX, Launch, LaunchRefusedError, LaunchState

_TIMEOUT_SECONDS = 10.0
_MESSAGE_CHARACTERS = 300
_STATES: dict[str, LaunchState] = {"PENDING": "waiting", "RUNNING": "running"}
"""Every other one has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySettings:
    address: str
    """Of the dashboard: http://host:8265."""
    cpus: float = 1.0
    """What Ray sets aside for a worker."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of the workers, beside the nodes' own; Ray's dashboard shows it, so nothing secret."""


class RayCluster:
    """A :class:`~tune.jobs.launchers.cluster.Cluster`."""

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        self._http = httpx.Client(base_url=settings.address, timeout=_TIMEOUT_SECONDS, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def launches(self) -> list[Launch]:
        answer = self._ask("GET", "/api/jobs/")
        return [_launch(given) for given in answer if str(given.get("submission_id")).startswith(NAME_PREFIX)]

    def launch(self, name: str, *, job_id: str, tenant: str, gpus: int) -> None:
        body = {
            "submission_id": name,
            "entrypoint": shlex.join(["capo", "worker", "--job", job_id, "--gpus", str(gpus)]),
            "entrypoint_num_cpus": self._settings.cpus,
            "entrypoint_num_gpus": gpus,
            "metadata": {"capo_job": job_id, "capo_tenant": tenant},
            "runtime_env": {"env_vars": dict(self._settings.environment)},
        }
        try:
            self._ask("POST", "/api/jobs/", body)
        except LaunchRefusedError:
            # Ray says "already exists" with the status of a fault of its own.
            if all(launch.name != name for launch in self.launches()):
                raise

    def remove(self, launch: Launch) -> None:
        if launch.state == "ended":
            self._ask("DELETE", f"/api/jobs/{launch.name}", fine=(404,))
        else:
            self._ask("POST", f"/api/jobs/{launch.name}/stop", fine=(404,))

    def _ask(self, verb: str, path: str, body: dict[str, Any] | None = None, *, fine: tuple[int, ...] = ()) -> Any:
        try:
            response = self._http.request(verb, path, json=body)
            if response.status_code in fine:
                return None
            if response.is_success:
                return response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise LaunchRefusedError(f"no answer from Ray at {self._settings.address}: {error}") from error
        raise LaunchRefusedError(
            f"Ray answered {verb} {path} with {response.status_code}: {response.text[:_MESSAGE_CHARACTERS]}"
        )


def _launch(given: Mapping[str, Any]) -> Launch:
    name = str(given["submission_id"])
    state = _STATES.get(str(given["status"]), "ended")
    reason = f"Ray says: {str(given.get('message'))[:_MESSAGE_CHARACTERS]}" if given["status"] == "FAILED" else None
    job_id = str((given.get("metadata") or {}).get("capo_job") or name.removeprefix(NAME_PREFIX).rpartition("-")[0])
    return Launch(name, job_id, state, reason)
