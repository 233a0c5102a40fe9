"""The five calls of the Kubernetes API that launching needs, with the token that every pod is given.

Plain HTTP: the official client brings a hundred thousand lines for these.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from registry.errors import InvalidRequestError
from tune.jobs.launchers.cluster import LaunchRefusedError

ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_SECONDS = 10.0
_PAGE = 200
_MESSAGE_CHARACTERS = 500

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class KubernetesAccess:
    """Where the API server is, and as whom it is asked."""

    url: str
    namespace: str
    token_path: Path
    """Read anew for each request: Kubernetes replaces a pod's token every hour."""
    authority_path: Path | None = None
    """The certificate of who vouches for the server; ``None`` = the system's."""

    @classmethod
    def in_cluster(cls, account_dir: Path = ACCOUNT_DIR) -> KubernetesAccess:
        """What Kubernetes gives to a pod (https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/).

        Raises:
            InvalidRequestError: this process runs in no pod, or in one without a service account's token.
        """
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not (account_dir / "token").is_file():
            raise InvalidRequestError(
                "launcher=kubernetes needs a pod with a service account's token, and here is none; set "
                "automountServiceAccountToken on the control process, or CAPO_LAUNCHER to local or ray",
                param="launcher",
            )
        address = f"[{host}]" if ":" in host else host
        return cls(
            f"https://{address}:{port}",
            (account_dir / "namespace").read_text().strip(),
            account_dir / "token",
            account_dir / "ca.crt",
        )


class KubernetesApi:
    """Jobs and pods of one namespace. Methods block; each raises :class:`LaunchRefusedError` for any answer that it
    does not take for a good one, with the server's own message."""

    def __init__(self, access: KubernetesAccess) -> None:
        self._access = access
        authority = None if access.authority_path is None else str(access.authority_path)
        # trust_env: a proxy of the environment is for the world outside.
        self._http = httpx.Client(
            base_url=access.url,
            verify=ssl.create_default_context(cafile=authority),
            timeout=_TIMEOUT_SECONDS,
            trust_env=False,
        )

    def close(self) -> None:
        self._http.close()

    def create_job(self, manifest: JsonObject) -> None:
        """An existing Job of the same name is fine."""
        self._ask("POST", self._jobs_path, body=manifest, fine=(409,))

    def delete_job(self, name: str) -> None:
        """With its pods. One that is gone is fine."""
        self._ask("DELETE", f"{self._jobs_path}/{name}", {"propagationPolicy": "Background"}, fine=(404,))

    def jobs(self, selector: str) -> Iterator[JsonObject]:
        return self._all(self._jobs_path, selector)

    def pods(self, selector: str) -> Iterator[JsonObject]:
        return self._all(f"/api/v1/namespaces/{self._access.namespace}/pods", selector)

    @property
    def _jobs_path(self) -> str:
        return f"/apis/batch/v1/namespaces/{self._access.namespace}/jobs"

    def _all(self, path: str, selector: str) -> Iterator[JsonObject]:
        query = {"labelSelector": selector, "limit": str(_PAGE)}
        while True:
            page = self._ask("GET", path, query)
            yield from page.get("items") or ()
            if not (more := (page.get("metadata") or {}).get("continue")):
                return
            query["continue"] = more

    def _ask(
        self,
        verb: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        body: JsonObject | None = None,
        fine: tuple[int, ...] = (),
    ) -> JsonObject:
        try:
            headers = {"Authorization": f"Bearer {self._access.token_path.read_text().strip()}"}
            response = self._http.request(verb, path, params=query, json=body, headers=headers)
            answer: JsonObject = response.json() if response.content else {}
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise LaunchRefusedError(f"no answer from Kubernetes at {self._access.url}: {error}") from error
        if response.is_success or response.status_code in fine:
            return answer
        wait = response.headers.get("retry-after", "")
        message = str(answer.get("message", response.reason_phrase))[:_MESSAGE_CHARACTERS]
        raise LaunchRefusedError(
            f"Kubernetes answered {verb} {path} with {response.status_code}: {message}",
            retry_after_seconds=float(wait) if wait.isdecimal() else None,
        )
