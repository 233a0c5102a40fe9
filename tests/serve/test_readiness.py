"""Requests that come before a service is ready or while it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from registry import Registry
from registry.errors import UnavailableError
from serve.catalog import Catalog
from serve.names_service import NamesService
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import NoGate, running_service


def refusal_of(service: Any) -> tuple[str, str | None, float | None]:
    with pytest.raises(UnavailableError) as refused:
        service.require_ready()
    return refused.value.message, refused.value.code, refused.value.retry_after_seconds


async def test_a_service_with_an_engine_and_one_without_refuse_in_the_same_words(tmp_path: Path) -> None:
    engine = FakeEngine()
    names = NamesService(Catalog(Registry(tmp_path), "base-model"), NoGate(), engine.limits)
    message, code, retry_after_seconds = refusal_of(names)
    assert (message, code) == ("The service is still starting. Try again shortly.", "starting")
    assert retry_after_seconds is not None, "HTTP's Retry-After comes of it"
    await names.start()
    names.require_ready()
    names.drain()
    async with running_service(engine, tmp_path) as (_, service):
        service.require_ready()
        await service.drain(deadline_seconds=1)
        assert refusal_of(names) == refusal_of(service)
    await names.stop()
