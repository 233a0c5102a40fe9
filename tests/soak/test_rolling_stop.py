"""SIGTERM with a hundred open streams: all of them end whole, and nobody new is let in."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import aiohttp
import grpc
import pytest

from registry import BaseModel
from tests.e2e.service import Service
from tests.soak.adapters import published
from tests.soak.answers import Answer, Ask, grpc_client, http_client
from tests.soak.figures import Figures

pytestmark = pytest.mark.engine

NUM_STREAMS, NUM_GRPC_STREAMS = 100, 10
NUM_TOKENS = 100


async def test_a_hundred_open_streams_end_whole_at_sigterm(
    service_with_two_slots: Callable[[], Service], base: BaseModel, figures: Figures
) -> None:
    service = service_with_two_slots()
    with published(service.registry, base, ["one", "two"], rank=8) as artifacts:
        models = ["capo-tiny", *(artifact.revision for artifact in artifacts)]
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(180)) as session,
            grpc.aio.insecure_channel(service.grpc_address) as channel,
        ):
            http = http_client(session, service.url, ignore_eos=True)
            rpc = grpc_client(channel, ignore_eos=True)
            streams = [
                asyncio.create_task(
                    (rpc if number < NUM_GRPC_STREAMS else http)(
                        models[number % len(models)], f"{number}: who are you?", NUM_TOKENS
                    )
                )
                for number in range(NUM_STREAMS)
            ]
            await until_open(service, session)
            finished_before = sum(stream.done() for stream in streams)
            sent_at = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            refused = await until_refused(http)
            refused_over_grpc = await rpc("capo-tiny", "Who are you?", 1)
            still_open = sum(not stream.done() for stream in streams)
            answers = await asyncio.gather(*streams)
    code = await asyncio.to_thread(service.process.wait, 30)
    stopped_after = time.monotonic() - sent_at
    cut = [answer for answer in answers if not answer.is_whole or len(answer.token_ids) != NUM_TOKENS]
    figures.record(
        "SIGTERM with 100 open streams",
        streams=NUM_STREAMS,
        tokens_each=NUM_TOKENS,
        open_when_refused=still_open,
        cut=len(cut),
        exit_code=code,
        seconds_to_exit=stopped_after,
    )
    assert finished_before == 0
    assert cut == []
    assert refused.error_code == refused_over_grpc.error_code == "draining"
    assert still_open > 0, "the refusal was seen when everything was over, which shows nothing"
    assert code == 0


async def until_open(service: Service, session: aiohttp.ClientSession) -> None:
    """Wait until all the streams are being answered."""
    deadline = time.monotonic() + 60
    while True:
        async with session.get(f"{service.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        in_flight = sum(float(line.split()[-1]) for line in lines if line.startswith("capo_requests_in_flight{"))
        if in_flight >= NUM_STREAMS:
            return
        assert time.monotonic() < deadline, f"{in_flight} of {NUM_STREAMS} streams are open"
        await asyncio.sleep(0.05)


async def until_refused(ask: Ask) -> Answer:
    """What a newcomer is told; the signal takes a moment to arrive."""
    deadline = time.monotonic() + 5
    while True:
        answer = await ask("capo-tiny", "Who are you?", 1)
        if answer.error_code is not None or time.monotonic() > deadline:
            return answer
