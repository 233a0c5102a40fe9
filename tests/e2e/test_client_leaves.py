"""A client of HTTP that closes its connection before the answer is whole."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.service import Service
from tests.soak.observe import metric, samples

pytestmark = pytest.mark.engine

LEFT = ("capo_requests_total", (("outcome", "cancelled"), ("protocol", "http")))
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1800, "n": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1800, "n": 4},
    "/v1/responses": {"input": "a", "max_output_tokens": 1800},
}


@pytest.mark.parametrize("stream", [False, True], ids=["in one piece", "mid-stream"])
@pytest.mark.parametrize("path", BODIES)
def test_a_client_that_leaves_frees_the_engine_within_a_second(service: Service, path: str, stream: bool) -> None:
    until(lambda: num_running(service) == 0, seconds=10)
    left_before = samples(service).get(LEFT, 0)
    body = {"model": "capo-tiny", "ignore_eos": True, "stream": stream, **BODIES[path]}
    with open_request(service, path, body) as connection:
        if stream:
            assert b"data: " in received_until(connection, b"data: ")
        until(lambda: num_running(service) > 0, seconds=10)
    # Closed by now.
    until(lambda: num_running(service) == 0, seconds=1)
    assert samples(service)[LEFT] == left_before + 1, "it was not cut off, but had ended"


def num_running(service: Service) -> float:
    return metric(service, "vllm:num_requests_running")


def open_request(service: Service, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection with the request on it. A client library would keep or drain the connection as it sees fit."""
    address = urlsplit(service.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    request = httpx.Request("POST", service.url + path, json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
    return connection


def received_until(connection: socket.socket, wanted: bytes) -> bytes:
    received = b""
    while wanted not in received and (more := connection.recv(65536)):
        received += more
    return received


def until(is_so: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {seconds:g} s"
        time.sleep(0.02)
