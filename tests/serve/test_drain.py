"""The end of inference: whom a drain waits for, and what those are told whom it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry import Registry
from serve.engine_api import Endpoint
from serve.service import ServingService
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import BASE, eventually, publish, running_service
from tests.serve.test_http import ask


@contextlib.contextmanager
def slow_disk(service: ServingService, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Looks at the registry take until the event is set."""
    go_on, look = threading.Event(), service.catalog._look

    def look_slowly(*seen: Any) -> Any:
        go_on.wait(5)
        return look(*seen)

    with monkeypatch.context() as patch:
        patch.setattr(service.catalog, "_look", look_slowly)
        try:
            yield go_on
        finally:
            go_on.set()


async def test_a_drain_waits_for_a_request_whose_name_is_still_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, service):
        with slow_disk(service, monkeypatch) as go_on:
            revision = publish(Registry(tmp_path), "late").revision
            asked = asyncio.create_task(ask(client, revision))
            await eventually(lambda: service._in_flight == 1)
            drain = asyncio.create_task(service.drain(5))
            await asyncio.sleep(0.05)
            assert not drain.done()
            go_on.set()
            assert (await asked).status_code == 200
            assert await drain == 0


async def test_who_is_still_looked_up_at_the_end_of_the_drain_is_told_that_the_service_shut_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    async with running_service(engine, tmp_path) as (client, service):
        with slow_disk(service, monkeypatch) as go_on:
            revision = publish(Registry(tmp_path), "late").revision
            asked = asyncio.create_task(ask(client, revision))
            await eventually(lambda: service._in_flight == 1)
            assert await service.drain(0.05) == 1
            stop = asyncio.create_task(service.stop())
            await eventually(lambda: engine.is_dead)
            go_on.set()
            await stop
            async with asyncio.timeout(3):
                answer = await asked
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shut_down")


class SlowTokenizer(FakeEngine):
    def __init__(self) -> None:
        super().__init__()
        self.token_gate = asyncio.Event()
        self.num_asked = 0

    async def convert_tokens(self, endpoint: Endpoint, body: Mapping[str, Any]) -> bytes:
        self.num_asked += 1
        await self.token_gate.wait()
        return await super().convert_tokens(endpoint, body)


async def test_a_drain_waits_for_what_is_tokenized_and_it_counts_among_the_requests_in_flight(tmp_path: Path) -> None:
    engine = SlowTokenizer()

    async def tokenize(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/tokenize", json={"model": BASE, "prompt": "hello"})

    async with running_service(engine, tmp_path, max_in_flight=1) as (client, service):
        first = asyncio.create_task(tokenize(client))
        try:
            await eventually(lambda: service._in_flight == engine.num_asked == 1)
            excess = await tokenize(client)
            assert (excess.status_code, excess.json()["error"]["code"]) == (503, "overloaded")
            drain = asyncio.create_task(service.drain(5))
            await asyncio.sleep(0.05)
            assert not drain.done()
        finally:
            engine.token_gate.set()
        assert (await first).status_code == 200
        assert await drain == 0
