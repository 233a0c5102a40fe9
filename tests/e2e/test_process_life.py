"""How a service's processes end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.service import Service, running

pytestmark = pytest.mark.engine


def slow_stream(service: Service, lines: list[str], opened: threading.Event) -> None:
    """Read a long streamed answer; every line goes into ``lines``."""
    body = {"model": "capo-tiny", "prompt": "a", "stream": True, "max_tokens": 1500, "ignore_eos": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line:
                lines.append(line)
                opened.set()


def still_alive(processes: list[psutil.Process], seconds: float = 5) -> list[str]:
    """The command lines of those that have not ended after so long. A zombie has ended; reaping it is not ours."""
    deadline = time.monotonic() + seconds
    while True:
        alive = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(" ".join(process.cmdline())[:200])
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def test_sigterm_lets_streams_finish_and_exits_zero_then_kill_leaves_no_process(tmp_path: Path) -> None:
    with running(tmp_path, "--workers", "0") as service:
        streams: list[list[str]] = [[] for _ in range(4)]
        threads = []
        for lines in streams:
            opened = threading.Event()
            thread = threading.Thread(target=slow_stream, args=(service, lines, opened))
            thread.start()
            threads.append(thread)
            assert opened.wait(20)
        everybody = service.processes()
        service.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert all(lines[-1] == "data: [DONE]" for lines in streams)
        assert service.process.wait(30) == 0
        assert still_alive(everybody) == []


def test_a_killed_engine_ends_its_streams_honestly_and_comes_back(tmp_path: Path) -> None:
    with running(tmp_path, "--workers", "0") as service:
        for _ in range(2):
            lines: list[str] = []
            opened = threading.Event()
            thread = threading.Thread(target=slow_stream, args=(service, lines, opened))
            thread.start()
            assert opened.wait(20)
            before = service.engine_pid()
            os.kill(before, signal.SIGKILL)
            thread.join(10)
            assert '"code": "engine_dead"' in lines[-1]
            began = time.monotonic()
            while httpx.get(f"{service.url}/readyz").status_code != 200:
                assert time.monotonic() - began < service.start_seconds + 5
                time.sleep(0.1)
            assert service.engine_pid() != before
        # The same body was in the engine at both deaths.
        body = {"model": "capo-tiny", "prompt": "a", "stream": True, "max_tokens": 1500, "ignore_eos": True}
        refused = httpx.post(f"{service.url}/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "quarantined")
        other = httpx.post(f"{service.url}/v1/completions", json={"model": "capo-tiny", "prompt": "b"})
        assert other.status_code == 200


def test_kill_of_the_service_leaves_no_process_behind(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        deadline = time.monotonic() + 20
        while len(service.processes()) < 5 and time.monotonic() < deadline:  # the worker starts after readiness
            time.sleep(0.1)
        everybody = service.processes()
        assert any("worker" in process.cmdline() for process in everybody)
        service.process.kill()
        assert still_alive(everybody) == []
