"""What nobody asks for costs nothing: a registry of a thousand adapters serves as one of ten does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import pytest

from bench.load import percentile
from registry import BaseModel
from tests.e2e.service import Service
from tests.sizes import LONG, size
from tests.soak.adapters import published
from tests.soak.answers import http_client
from tests.soak.figures import Figures

pytestmark = pytest.mark.engine

FEW, MANY = 10, size(200, 1000)
ROUNDS = size(1, 6)
SECONDS = size(2, 10)
MOST_SLOWDOWN = 1.05 if LONG else 1.5
NUM_STREAMS, NUM_USED = 8, 4
STREAM_TOKENS = 48


@dataclass(slots=True)
class Seen:
    """With one size of registry, over all rounds; seconds."""

    first_tokens: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)


async def test_streams_are_as_fast_beside_a_thousand_adapters_as_beside_ten(
    service: Service, base: BaseModel, figures: Figures
) -> None:
    few_names = [f"few{number}" for number in range(FEW)]
    rest_names = [f"many{number}" for number in range(MANY - FEW)]
    few, many = Seen(), Seen()
    with published(service.registry, base, few_names, rank=4) as artifacts:
        models = ["capo-tiny", *(artifact.revision for artifact in artifacts[:NUM_USED])]
        for _ in range(ROUNDS):  # in turn, because the machine's own pace drifts
            await stream_for(service, models, few)
            with published(service.registry, base, rest_names, rank=4, first_seed=FEW):
                await stream_for(service, models, many)
    ratios = {
        what: percentile(getattr(many, what), 0.5) / percentile(getattr(few, what), 0.5)
        for what in ("first_tokens", "answers")
    }
    figures.record(
        f"streams beside {MANY} adapters against {FEW}",
        rounds=ROUNDS,
        answers_few=len(few.answers),
        answers_many=len(many.answers),
        first_token_p50_ms_few=1000 * percentile(few.first_tokens, 0.5),
        first_token_p50_ms_many=1000 * percentile(many.first_tokens, 0.5),
        answer_p50_ms_few=1000 * percentile(few.answers, 0.5),
        answer_p50_ms_many=1000 * percentile(many.answers, 0.5),
        **{f"ratio_{what}": ratio for what, ratio in ratios.items()},
    )
    assert all(ratio <= MOST_SLOWDOWN for ratio in ratios.values()), ratios


async def stream_for(service: Service, models: Sequence[str], seen: Seen) -> None:
    """Eight streams over the base and four adapters for some seconds, once the registry was read."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        stream = http_client(session, service.url, ignore_eos=True)
        for model in models:
            assert (await stream(model, "Who are you?", 4)).is_whole
        await asyncio.sleep(1)
        until = time.monotonic() + SECONDS

        async def keep_streaming(number: int) -> None:
            while time.monotonic() < until:
                answer = await stream(models[number % len(models)], f"{number}: who are you?", STREAM_TOKENS)
                assert answer.is_whole
                seen.first_tokens.append(answer.first_token_at - answer.began_at)
                seen.answers.append(answer.ended_at - answer.began_at)

        await asyncio.gather(*(keep_streaming(number) for number in range(NUM_STREAMS)))
