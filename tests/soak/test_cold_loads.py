"""What a cold adapter costs those who are streaming already."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp
import pytest

from bench.load import percentile
from registry import BaseModel
from tests.e2e.service import Service
from tests.sizes import LONG, size
from tests.soak.adapters import published
from tests.soak.answers import Answer, Ask, http_client
from tests.soak.figures import Figures
from tests.soak.observe import load_seconds, metric

pytestmark = pytest.mark.engine

NUM_STREAMS = 16
NUM_SLOTS, NUM_HOT = 8, 4
NUM_LOADS = size(5, 50)
LOADS_PER_ROUND = 10
LARGEST_RANK = 16
"""Of the service's engine: the default."""
PAUSE_SECONDS = 0.3
STREAM_TOKENS = 96
MOST_SLOWDOWN = 1.2 if LONG else 2.0
"""Of the 99th percentile between two tokens. A short run has too few tokens for a sharp one."""


async def test_cold_loads_hardly_slow_the_streams(service: Service, base: BaseModel, figures: Figures) -> None:
    registry = service.registry
    with published(registry, base, [f"hot{n}" for n in range(NUM_SLOTS)], rank=8) as resident:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
            stream = http_client(session, service.url, ignore_eos=True)
            # With all slots taken, nothing that is published from here on is loaded ahead of its first request.
            for artifact in resident:
                assert (await stream(artifact.revision, "Who are you?", 1)).is_whole
            hot = [artifact.revision for artifact in resident[:NUM_HOT]]
            names = [f"cold{n}" for n in range(NUM_LOADS)]
            with published(registry, base, names, rank=LARGEST_RANK, first_seed=99) as cold:
                assert await gaps_while(stream, hot, hot[:1] * 3)  # to warm up
                loads_before = metric(service, "capo_adapter_loads_total")
                quiet: list[float] = []
                loading: list[float] = []
                for first in range(0, NUM_LOADS, LOADS_PER_ROUND):  # in turn, because the machine's own pace drifts
                    arriving = [artifact.revision for artifact in cold[first : first + LOADS_PER_ROUND]]
                    quiet += await gaps_while(stream, hot, hot[:1] * len(arriving))
                    loading += await gaps_while(stream, hot, arriving)
                loads = metric(service, "capo_adapter_loads_total") - loads_before
                took = load_seconds(service)
    slowdown = percentile(loading, 0.99) / percentile(quiet, 0.99)
    figures.record(
        "cold loads under 16 streams",
        loads=int(loads),
        rank=LARGEST_RANK,
        gaps_quiet=len(quiet),
        gaps_loading=len(loading),
        p50_ms_quiet=1000 * percentile(quiet, 0.5),
        p50_ms_loading=1000 * percentile(loading, 0.5),
        p99_ms_quiet=1000 * percentile(quiet, 0.99),
        p99_ms_loading=1000 * percentile(loading, 0.99),
        longest_ms_quiet=1000 * max(quiet),
        longest_ms_loading=1000 * max(loading),
        p99_slowdown=slowdown,
        load_ms_median=1000 * percentile([took[artifact.revision] for artifact in cold], 0.5),
    )
    assert loads == NUM_LOADS
    assert slowdown <= MOST_SLOWDOWN


async def gaps_while(stream: Ask, hot: Sequence[str], arriving: Sequence[str]) -> list[float]:
    """Seconds between the tokens of the streams, while one token is asked of each of ``arriving`` in turn."""
    stop = asyncio.Event()

    async def keep_streaming(number: int) -> list[Answer]:
        answers: list[Answer] = []
        while not stop.is_set():
            prompt = f"{number} {len(answers)}: what is beside the mill?"
            answers.append(await stream(hot[number % len(hot)], prompt, STREAM_TOKENS))
        return answers

    streams = [asyncio.create_task(keep_streaming(number)) for number in range(NUM_STREAMS)]
    for model in arriving:
        await asyncio.sleep(PAUSE_SECONDS)
        assert (await stream(model, "Who are you?", 1)).is_whole
    stop.set()
    answers = [answer for one in await asyncio.gather(*streams) for answer in one]
    assert all(answer.is_whole for answer in answers)
    return [gap for answer in answers for gap in answer.gaps_seconds]
