"""Whoever waits in the line gets a turn: tenants in turn, one at a time, and nobody beyond a stated time."""

from __future__ import annotations

import asyncio
import random

import pytest

from serve.fair_line import FairLine

LONG = 60.0


async def test_a_tenant_waits_for_one_turn_of_each_other_and_not_for_all_that_one_wants() -> None:
    line, order = FairLine(), []

    async def take(tenant: str) -> None:
        async with line.turn(tenant, longest_wait_seconds=LONG):
            order.append(tenant)
            await asyncio.sleep(0)

    await asyncio.gather(*[take(tenant) for tenant in "aaaaabcb"])
    assert "".join(order) == "abacbaaa"


async def test_who_waits_too_long_is_told_and_leaves_no_trace() -> None:
    line = FairLine()
    async with line.turn("a", longest_wait_seconds=LONG):
        with pytest.raises(TimeoutError):
            await line.turn("b", longest_wait_seconds=0.01).__aenter__()
    async with asyncio.timeout(1), line.turn("c", longest_wait_seconds=LONG):
        pass


@pytest.mark.parametrize("seed", range(30))
async def test_under_random_departures_one_has_the_turn_at_a_time_and_it_never_gets_lost(seed: int) -> None:
    line, of = FairLine(), random.Random(seed)
    holders, most, served = 0, 0, 0

    async def take() -> None:
        nonlocal holders, most, served
        async with line.turn(of.choice("abc"), longest_wait_seconds=of.choice([0, 0.001, LONG])):
            holders += 1
            most = max(most, holders)
            try:
                for _ in range(of.randrange(3)):
                    await asyncio.sleep(0)
                served += 1
            finally:
                holders -= 1

    tasks = []
    for _ in range(60):
        tasks.append(asyncio.create_task(take()))
        if of.random() < 0.3:
            of.choice(tasks).cancel()
        for _ in range(of.randrange(3)):
            await asyncio.sleep(0)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), TimeoutError, asyncio.CancelledError}
    assert (most, served) == (1, sum(outcome is None for outcome in outcomes))
    async with asyncio.timeout(1), line.turn("d", longest_wait_seconds=LONG):
        pass
