"""What a real service shows of itself: its ports, and its patience with prompts that are far too long."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from registry import EMBEDDED_MODEL_ID
from tests.e2e.service import Service
from tests.sizes import size

pytestmark = pytest.mark.engine

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_nothing_listens_but_the_declared_ports_and_nothing_beyond_this_machine(service: Service) -> None:
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in service.processes()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    declared = {urlsplit(service.url).port, int(service.grpc_address.rpartition(":")[2])}
    assert {address for address, _ in listening} <= LOOPBACK
    # Beside them, what the engine's own processes use to find each other: on loopback, on ports of its choice.
    assert declared <= {port for _, port in listening}


def test_prompts_of_a_megabyte_are_refused_and_hold_up_nobody(service: Service) -> None:
    prompt = "ab cd " * (1024 * 1024 // 6)
    seconds: list[float] = []
    is_over = threading.Event()

    def look() -> None:
        with httpx.Client(base_url=service.url, trust_env=False) as client:
            while not is_over.is_set():
                began = time.monotonic()
                assert client.get("/livez").status_code == 200
                seconds.append(time.monotonic() - began)
                time.sleep(0.01)

    def ask(_: int) -> httpx.Response:
        body = {"model": EMBEDDED_MODEL_ID, "prompt": prompt, "max_tokens": 1}
        return httpx.post(f"{service.url}/v1/completions", json=body, timeout=60, trust_env=False)

    looking = threading.Thread(target=look)
    looking.start()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(size(8, 64))))
    is_over.set()
    looking.join()
    assert {answer.status_code for answer in answers} == {400}
    assert all("context length" in answer.json()["error"]["message"] for answer in answers), answers[0].text[:300]
    assert statistics.quantiles(seconds, n=100)[94] < 0.5, "of a machine whose cores are all busy with it"
