"""How a service's processes end, and what the open streams hear of it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from tests.e2e.open_streams import MAX_TOKENS, GrpcStream, HttpStream, OpenStream
from tests.e2e.service import Service, running

pytestmark = pytest.mark.engine

STALL_SECONDS = 6.0
"""Well above the first step of an engine that has just started, on a machine that does much besides."""
DRAIN_SECONDS = 1.0


@pytest.fixture(scope="module")
def impatient_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Service]]:
    """Gives a service with a short stall limit and a short drain: the one that runs, or a new one if that was ended."""
    started: list[Service] = []
    with contextlib.ExitStack() as services, pytest.MonkeyPatch.context() as environment:
        environment.setenv("CAPO_ENGINE_STALL_SECONDS", str(STALL_SECONDS))
        environment.setenv("CAPO_DRAIN_SECONDS", str(DRAIN_SECONDS))

        def get() -> Service:
            if not started or started[-1].process.poll() is not None:
                data_dir = tmp_path_factory.mktemp("impatient")
                started.append(services.enter_context(running(data_dir, "--workers", "0")))
            return started[-1]

        yield get


def completion(service: Service, prompt: str) -> HttpStream:
    return HttpStream(service, "/v1/completions", {"prompt": prompt})


def wait_until_open(streams: Iterable[OpenStream]) -> None:
    for stream in streams:
        stream.wait_until_open()


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


def wait_until_ready(service: Service) -> None:
    began = time.monotonic()
    while httpx.get(f"{service.url}/readyz").status_code != 200:
        assert time.monotonic() - began < service.start_seconds + 5
        time.sleep(0.1)


def test_sigterm_lets_streams_finish_and_exits_zero_then_kill_leaves_no_process(tmp_path: Path) -> None:
    with running(tmp_path, "--workers", "0") as service:
        streams = [completion(service, "a") for _ in range(4)]
        wait_until_open(streams)
        everybody = service.processes()
        service.process.send_signal(signal.SIGTERM)
        for stream in streams:
            stream.join(60)
        assert all(stream.lines[-1] == "data: [DONE]" for stream in streams)
        assert service.process.wait(30) == 0
        assert still_alive(everybody) == []


def test_a_killed_engine_ends_its_streams_honestly_and_comes_back(impatient_service: Callable[[], Service]) -> None:
    service = impatient_service()
    for _ in range(2):
        stream = completion(service, "killed")
        stream.wait_until_open()
        before = service.engine_pid()
        os.kill(before, signal.SIGKILL)
        stream.join(10)
        assert (stream.error_code, stream.is_whole) == ("engine_dead", False)
        wait_until_ready(service)
        assert service.engine_pid() != before
    # The same body was in the engine at both deaths.
    body = {"model": "capo-tiny", "stream": True, "ignore_eos": True, "max_tokens": MAX_TOKENS, "prompt": "killed"}
    refused = httpx.post(f"{service.url}/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "quarantined")
    other = httpx.post(f"{service.url}/v1/completions", json={"model": "capo-tiny", "prompt": "b"})
    assert other.status_code == 200


def test_an_engine_that_stands_still_is_ended_with_honest_streams_and_comes_back(
    impatient_service: Callable[[], Service],
) -> None:
    """A stopped process neither answers nor dies, as one that waits for a device for ever."""
    service = impatient_service()
    question = {"model": "capo-tiny", "prompt": "The baker", "temperature": 0, "max_tokens": 8}
    before = httpx.post(f"{service.url}/v1/completions", json=question).json()["choices"]
    streams = [completion(service, "stands still"), GrpcStream(service, "stands still too")]
    wait_until_open(streams)
    engine = psutil.Process(service.engine_pid())
    engines = [engine, *engine.children(recursive=True)]
    stopped_at = time.monotonic()
    engine.suspend()
    for stream in streams:
        stream.join(STALL_SECONDS + 10)
        assert stream.error_code == "engine_dead"
    assert time.monotonic() - stopped_at >= STALL_SECONDS - 1, "something else ended the streams"
    over_http, over_grpc = streams
    assert not over_http.is_whole
    assert (over_grpc.status, over_grpc.has_usage) == (grpc.StatusCode.UNAVAILABLE, False)
    assert still_alive(engines) == []
    wait_until_ready(service)
    assert httpx.post(f"{service.url}/v1/completions", json=question).json()["choices"] == before


def test_streams_that_outlast_the_drain_end_with_an_error_and_the_service_exits_zero(
    impatient_service: Callable[[], Service],
) -> None:
    service = impatient_service()
    asked = {
        "/v1/completions": {"prompt": "outlast"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "outlast"}]},
        "/v1/responses": {"input": "outlast"},
    }
    over_http = [HttpStream(service, path, body) for path, body in asked.items() for _ in range(4)]
    over_grpc = [GrpcStream(service, "outlast") for _ in range(4)]
    wait_until_open((*over_http, *over_grpc))
    everybody = service.processes()
    told_at = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    for stream in (*over_http, *over_grpc):
        stream.join(DRAIN_SECONDS + 20)
    assert time.monotonic() - told_at >= DRAIN_SECONDS, "the streams had less than the time that they are given"
    assert service.process.wait(30) == 0
    assert [(stream.error_code, stream.is_whole) for stream in over_http] == [("shut_down", False)] * 12
    assert all(stream.status is not None for stream in over_grpc)
    assert [(stream.status, stream.has_usage) for stream in over_grpc if stream.status is grpc.StatusCode.OK] == []
    assert "16 requests were still running at the drain deadline" in service.log()
    assert still_alive(everybody) == []


def test_kill_of_the_service_leaves_no_process_behind(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        deadline = time.monotonic() + 20
        while len(service.processes()) < 5 and time.monotonic() < deadline:  # the worker starts after readiness
            time.sleep(0.1)
        everybody = service.processes()
        assert any("worker" in process.cmdline() for process in everybody)
        service.process.kill()
        assert still_alive(everybody) == []
