"""A Ray cluster of two nodes on this machine, in an environment of its own that shares nothing with Capo's."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.ports import free_port

_ENVIRONMENT = Path("build/ray").absolute()
_LOCK = Path(__file__).parent / "ray.lock"
_OBJECT_STORE_BYTES = 80_000_000
"""Ray's smallest; nothing here uses it."""


@dataclass(frozen=True)
class RayNodes:
    address: str
    """Of the dashboard."""
    head: subprocess.Popen[bytes]
    worker: subprocess.Popen[bytes]

    def jobs(self) -> dict[str, dict[str, Any]]:
        """By submission id."""
        answer = httpx.get(f"{self.address}/api/jobs/", trust_env=False).json()
        return {job["submission_id"]: job for job in answer if job["submission_id"] is not None}

    def nodes(self) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.address}/nodes?view=summary", trust_env=False).json()
        summary: list[dict[str, Any]] = answer["data"]["summary"]
        return summary


def ray_program() -> Path:
    """Installs Ray where it is not yet."""
    wanted = hashlib.sha256(_LOCK.read_bytes()).hexdigest()
    python, stamp = _ENVIRONMENT / "bin" / "python", _ENVIRONMENT / "lock.sha256"
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(_ENVIRONMENT, with_pip=True, clear=True)
        install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "-r", _LOCK]
        subprocess.run(install, check=True)
        stamp.write_text(wanted)
    return _ENVIRONMENT / "bin" / "ray"


@contextlib.contextmanager
def running_ray(directory: Path) -> Iterator[RayNodes]:
    """The head plans and works nothing, so that a job proves to have run on the other node.

    ``capo`` of this test's environment is on the nodes' PATH. The sockets' paths below ``directory`` must be short.
    """
    ray = ray_program()
    gcs_port, dashboard_port = free_port(), free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    shared = ["--block", f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    head = [
        ray, "start", "--head", "--num-cpus=0", f"--port={gcs_port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}", f"--temp-dir={directory}", *shared,
    ]  # fmt: skip
    node = [ray, "start", f"--address=127.0.0.1:{gcs_port}", "--num-cpus=2", *shared]
    started: list[subprocess.Popen[bytes]] = []
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "ray.log").open("wb") as log:

        def start(command: list[Any]) -> subprocess.Popen[bytes]:
            # A session of its own: Ray starts a dozen processes, and all of them are to end with it.
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            started.append(process)
            return process

        try:
            address = f"http://127.0.0.1:{dashboard_port}"
            first = start(head)
            _wait(lambda: httpx.get(f"{address}/api/version", trust_env=False).is_success, directory / "ray.log")
            nodes = RayNodes(address, first, start(node))
            _wait(
                lambda: sum(given["raylet"]["state"] == "ALIVE" for given in nodes.nodes()) == 2, directory / "ray.log"
            )
            yield nodes
        finally:
            for process in reversed(started):
                process.terminate()
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(15)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(condition: Any, log: Path, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
            if condition():
                return
        assert time.monotonic() < deadline, f"Ray did not start: {log.read_text()[-2000:]}"
        time.sleep(0.2)
