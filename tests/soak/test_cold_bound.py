"""Hot adapters keep every slot busy, and a cold one still gets its turn within a stated time."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable, Sequence

import aiohttp
import pytest

from registry import BaseModel
from serve.pool import AdapterPool
from tests.e2e.service import Service
from tests.sizes import size
from tests.soak.adapters import published
from tests.soak.answers import Answer, Ask, http_client
from tests.soak.figures import Figures
from tests.soak.observe import load_seconds, metric

pytestmark = pytest.mark.engine

TURN_SECONDS: float = inspect.signature(AdapterPool).parameters["turn_seconds"].default
NUM_SLOTS = 2
NUM_ARRIVALS = size(3, 20)
CLIENTS_PER_ADAPTER = 4
HOT_TOKENS = 64
PAUSES_SECONDS = (0.2, 2.0)
"""Between two arrivals. After a short one the hot adapters' turns have just begun, after a long one they are up."""
OVERHEAD_SECONDS = 0.5
"""Reading the adapter's bytes, one prefill and the way through both processes, on two busy cores."""


async def test_a_cold_adapter_gets_its_first_token_in_time(
    service_with_two_slots: Callable[[], Service], base: BaseModel, figures: Figures
) -> None:
    """The bound for one that finds nobody in line before it::

        turn_seconds + the longest running answer + its load + OVERHEAD_SECONDS

    A hot adapter keeps its slot for ``turn_seconds`` while somebody waits, then takes no new request, and leaves when
    its last running answer ends. Each adapter that is in line before adds the same once more.
    """
    service = service_with_two_slots()
    hot_names = [f"hot{number}" for number in range(NUM_SLOTS)]
    cold_names = [f"cold{number}" for number in range(NUM_ARRIVALS)]
    with (
        published(service.registry, base, hot_names, rank=8) as hot,
        published(service.registry, base, cold_names, rank=16, first_seed=100) as cold,
    ):
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
            stream = http_client(session, service.url, ignore_eos=True)
            stop = asyncio.Event()
            clients = [
                asyncio.create_task(keep_streaming(stream, artifact.revision, stop))
                for artifact in hot
                for _ in range(CLIENTS_PER_ADAPTER)
            ]
            arrived: list[Answer] = []
            random_of = random.Random(0)
            loads_before = metric(service, "capo_adapter_loads_total")
            for artifact in cold:
                await asyncio.sleep(random_of.uniform(*PAUSES_SECONDS))
                arrived.append(await stream(artifact.revision, "Who are you?", 1))
            loads = metric(service, "capo_adapter_loads_total") - loads_before
            longest_load = max(load_seconds(service)[artifact.revision] for artifact in cold)
            stop.set()
            answers = [answer for client in await asyncio.gather(*clients) for answer in client]
    longest = max(answer.ended_at - answer.first_token_at for answer in answers)
    waits = sorted(answer.first_token_at - answer.began_at for answer in arrived)
    bound = TURN_SECONDS + longest + longest_load + OVERHEAD_SECONDS
    figures.record(
        "cold arrivals with every slot busy",
        arrivals=len(arrived),
        slots=NUM_SLOTS,
        hot_streams=len(clients),
        hot_answers=len(answers),
        turn_seconds=TURN_SECONDS,
        longest_running_answer_seconds=longest,
        longest_load_seconds=longest_load,
        bound_seconds=bound,
        first_token_median_seconds=waits[len(waits) // 2],
        first_token_longest_seconds=waits[-1],
        hot_first_token_longest_seconds=max(answer.first_token_at - answer.began_at for answer in answers),
    )
    assert all(answer.is_whole for answer in (*arrived, *answers))
    assert loads >= NUM_ARRIVALS
    assert waits[-1] <= bound


async def keep_streaming(stream: Ask, model: str, stop: asyncio.Event) -> Sequence[Answer]:
    answers: list[Answer] = []
    while not stop.is_set():
        answers.append(await stream(model, f"{len(answers)}: who are you?", HOT_TOKENS))
    return answers
