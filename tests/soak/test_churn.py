"""Adapters come and go for a long time, and nothing of them stays behind."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator

import aiohttp
import pytest

from registry import BaseModel
from tests.e2e.service import Service
from tests.sizes import LONG, size
from tests.soak.adapters import published
from tests.soak.answers import http_client
from tests.soak.figures import Figures
from tests.soak.kv_cache import use_the_whole_kv_cache
from tests.soak.observe import adapter_views, capo_series, memory_bytes, metric

pytestmark = pytest.mark.engine

NUM_ADAPTERS = size(20, 200)
NUM_LOADS = size(150, 10_000)
NUM_CLIENTS = 6
MOST_GROWTH = 0.02 if LONG else 0.10
"""Of each process's memory from the first tenth of the loads to the last. In a short run the allocator has not yet
found its level."""
SETTLE_SECONDS = 20.0


async def test_loading_and_unloading_for_long_leaves_nothing_behind(
    service: Service, base: BaseModel, figures: Figures
) -> None:
    series_before = capo_series(service)
    names = [f"churned{number}" for number in range(NUM_ADAPTERS)]
    if LONG:
        await use_the_whole_kv_cache(service)
    with published(service.registry, base, names, rank=4) as artifacts:
        models = [artifact.revision for artifact in artifacts]
        loads_before = metric(service, "capo_adapter_loads_total")
        loads, requests = 0, 0
        memory: list[dict[str, int]] = []
        """After each tenth of the loads."""
        began_at = time.monotonic()
        for tenth in range(1, 11):
            while (missing := tenth * NUM_LOADS // 10 - loads) > 0:
                await ask_each(service, models, seed=requests, num_requests=missing)
                requests += missing
                loads = int(metric(service, "capo_adapter_loads_total") - loads_before)
            memory.append(memory_bytes(service))
        seconds = time.monotonic() - began_at
        resident = metric(service, "capo_adapters_resident")
    warm, end = memory[0], memory[-1]
    gone = await settled(service)
    series_left = capo_series(service) - series_before
    growth = {role: end[role] / warm[role] - 1 for role in warm}
    figures.record(
        f"churn over {NUM_ADAPTERS} adapters",
        loads=loads,
        requests=requests,
        ms_per_load=1000 * seconds / loads,
        **{f"growth_{role}": share for role, share in growth.items()},
        **{f"mib_{role}": ", ".join(f"{one[role] / 2**20:.1f}" for one in memory) for role in warm},
        resident_while_churning=int(resident),
        resident_after_removal=int(metric(service, "capo_adapters_resident")),
        series_left=len(series_left),
    )
    assert set(end) == set(warm)
    assert all(share <= MOST_GROWTH for share in growth.values()), growth
    assert resident <= 8
    assert gone
    # Counters of the whole service may begin to exist; no series may name an adapter that is gone.
    assert [key for key in series_left if any(value in names for _, value in key[1])] == []


async def ask_each(service: Service, models: list[str], *, seed: int, num_requests: int) -> None:
    """One token from each model in random order, over and over; every answer must come."""
    order: Iterator[str] = itertools.islice(endless(models, seed), num_requests)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        ask = http_client(session, service.url)

        async def one_client() -> None:
            for model in order:
                answer = await ask(model, "Who are you?", 1)
                assert answer.is_whole, answer.error_code
                assert answer.model == model

        await asyncio.gather(*(one_client() for _ in range(NUM_CLIENTS)))


def endless(models: list[str], seed: int) -> Iterator[str]:
    random_of = random.Random(seed)
    while True:
        yield from random_of.sample(models, len(models))


async def settled(service: Service) -> bool:
    """Whether the engine is empty again soon after the adapters left the registry."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        if not adapter_views(service) and metric(service, "capo_adapters_resident") == 0:
            return True
        await asyncio.sleep(0.2)
    return False
