"""kill -9 of the engine under mixed traffic: what was cut says so, and the service is back within a stated time."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import aiohttp
import grpc
import pytest

from registry import BaseModel
from tests.e2e.service import Service
from tests.sizes import size
from tests.soak.adapters import published
from tests.soak.answers import Answer, Ask, grpc_client, http_client
from tests.soak.figures import Figures
from tests.soak.observe import adapter_views

pytestmark = pytest.mark.engine

NUM_KILLS = size(1, 5)
NUM_HTTP_STREAMS, NUM_GRPC_STREAMS = 6, 4
LONG_ANSWER_TOKENS = 1500
EXTRA_SECONDS = 5.0


async def test_a_killed_engine_cuts_streams_honestly_and_is_back_soon(
    service: Service, base: BaseModel, figures: Figures
) -> None:
    back_after: list[float] = []
    noticed_after: list[float] = []
    cut: list[Answer] = []
    with published(service.registry, base, ["killed0", "killed1"], rank=8) as artifacts:
        models = ["capo-tiny", *(artifact.revision for artifact in artifacts)]
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session,
            grpc.aio.insecure_channel(service.grpc_address) as channel,
        ):
            http = http_client(session, service.url, ignore_eos=True)
            clients = [http] * NUM_HTTP_STREAMS + [grpc_client(channel, ignore_eos=True)] * NUM_GRPC_STREAMS
            before = [(await http(model, "Who are you?", 8)).token_ids for model in models]
            for kill in range(NUM_KILLS):
                streams = [
                    # Another text each time: a body that saw two deaths is refused, which test_process_life shows.
                    asyncio.create_task(
                        client(models[n % len(models)], f"{kill} {n}: tell me a story", LONG_ANSWER_TOKENS)
                    )
                    for n, client in enumerate(clients)
                ]
                await asyncio.sleep(1.5)
                assert not any(stream.done() for stream in streams)
                killed_at = time.monotonic()
                os.kill(service.engine_pid(), signal.SIGKILL)
                answers = await asyncio.gather(*streams)
                noticed_after.append(time.monotonic() - killed_at)
                cut += answers
                back_after.append(await until_back(http, killed_at))
                after = [(await http(model, "Who are you?", 8)).token_ids for model in models]
                assert after == before
            states = [adapter_views(service)[model]["state"] for model in models[1:]]
    figures.record(
        "kill -9 of the engine",
        kills=NUM_KILLS,
        streams_cut=len(cut),
        cut_without_error=sum(answer.is_whole or answer.error_code is None for answer in cut),
        streams_ended_after_longest_seconds=max(noticed_after),
        back_after_longest_seconds=max(back_after),
        back_after_median_seconds=sorted(back_after)[len(back_after) // 2],
        service_start_seconds=service.start_seconds,
    )
    assert all(not answer.is_whole for answer in cut)
    assert {answer.error_code for answer in cut} == {"engine_dead"}
    assert all(answer.token_ids for answer in cut), "they were cut before they began, which shows less"
    assert max(back_after) <= service.start_seconds + EXTRA_SECONDS
    assert states == ["loaded", "loaded"]
    # vLLM's traces of ten cut streams would fill a pipe that nobody reads, and stop the service at its next word.
    assert not any("Traceback" in line for line in service.output)


async def until_back(ask: Ask, killed_at: float) -> float:
    """Seconds from the kill to the first token of a new request; in between each is refused, none hangs."""
    while True:
        answer = await ask("capo-tiny", "Are you back?", 1)
        if answer.is_whole:
            return answer.first_token_at - killed_at
        assert answer.error_code == "engine_dead", answer.error_code
        assert time.monotonic() - killed_at < 120
        await asyncio.sleep(0.1)
