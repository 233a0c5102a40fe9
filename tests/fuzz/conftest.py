"""One service for all of it, and the watch that says whether it came through."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from tests.e2e.service import Service, running
from tests.fuzz.watch import Watch
from tests.sizes import LONG
from tests.soak.kv_cache import use_every_prompt_length, use_the_whole_kv_cache


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("fuzz"), "--workers", "0") as started:
        yield started


@pytest.fixture(scope="session")
def watch(service: Service) -> Iterator[Watch]:
    if LONG:
        asyncio.run(use_the_whole_kv_cache(service))
        asyncio.run(use_every_prompt_length(service))
    with contextlib.closing(Watch(service)) as watching:
        yield watching
