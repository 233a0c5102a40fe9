"""What must hold whatever is sent: the same engine, bounded memory, honest answers, and service afterwards."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil

from tests.e2e.service import Service
from tests.sizes import size

NUM_REQUESTS = int(os.environ.get("CAPO_FUZZ_REQUESTS", size(16, 10_000)))
"""For each endpoint and each kind of nonsense."""
MODEL = "capo-tiny"
# Caches fill: of compiled grammars (bounded by size), of prefixes, of the allocators. A leak of a body for each of
# 10,000 requests would be far more.
MOST_GROWTH_BYTES = 400 * 1024**2


class Watch:
    """Takes the service's state before the first test; :meth:`over` compares after each."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.http = httpx.Client(base_url=service.url, timeout=60)
        self._ask()
        self._engine_pid = service.engine_pid()
        self._memory = self._pss_of_each()

    @contextlib.contextmanager
    def over(self, name: str) -> Iterator[Counter[str]]:
        """Count the outcomes in what is yielded; they are printed (pytest -s)."""
        outcomes: Counter[str] = Counter()
        yield outcomes
        print(f"\n{name}: {sum(outcomes.values())} requests, {dict(outcomes.most_common())}")
        assert self.service.engine_pid() == self._engine_pid, "the engine died"
        self._ask()
        for process, memory in self._pss_of_each().items():
            grown = memory - self._memory.get(process, memory)  # one that tries out constraints may be a new one
            assert grown < MOST_GROWTH_BYTES, f"{process.name()} grew by {grown / 1e6:.0f} MB"

    def close(self) -> None:
        self.http.close()

    def _ask(self) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 4}
        assert self.http.post("/v1/chat/completions", json=body).status_code == 200
        schema = {"structured_outputs": {"choice": ["yes", "no"]}}
        assert self.http.post("/v1/chat/completions", json=body | schema).status_code == 200

    def _pss_of_each(self) -> dict[psutil.Process, int]:
        return {process: process.memory_full_info().pss for process in self.service.processes()}


def check_http(response: httpx.Response) -> str:
    """The outcome in a word, after checks that hold for every answer."""
    if response.status_code < 400:
        if response.headers["content-type"].startswith("text/event-stream"):
            _check_stream(response.text)
        return str(response.status_code)
    # No 503 either: one request at a time fills no queue, so it would say that something was harmed.
    assert response.status_code < 500, f"{response.status_code}: {response.text}"
    error: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["message"]
    return f"{response.status_code} {error['code']}"


def _check_stream(text: str) -> None:
    """It ends as a whole answer does, or with an error that is the client's own fault."""
    last = text.rstrip().rpartition("\n")[2].removeprefix("data: ")
    if last == "[DONE]":
        return
    event = json.loads(last)
    if event.get("type") in ("response.completed", "response.incomplete"):
        return
    error = event.get("error", event)
    assert error.get("code") != "internal_error", text[-500:]
