"""What nobody asks for costs nothing: a registry of a thousand adapters serves as one of ten does."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from bench.load import percentile
from registry import BaseModel, Registry
from tests.e2e.service import running
from tests.sizes import LONG, size
from tests.soak.adapters import publish_random
from tests.soak.answers import http_client
from tests.soak.conftest import ENGINE_ARGUMENTS
from tests.soak.figures import Figures

pytestmark = pytest.mark.engine

FEW, MANY = 10, size(200, 1000)
REPEATS = size(1, 5)
SECONDS = size(4, 12)
MOST_SLOWDOWN = 1.05 if LONG else 1.5
NUM_STREAMS, NUM_USED = 8, 4
STREAM_TOKENS = 48


@dataclass(slots=True)
class Seen:
    """Of one registry, over all repeats; seconds."""

    starts: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    """The median of each repeat."""
    answers: list[float] = field(default_factory=list)
    """The same, for whole answers."""


async def test_a_thousand_adapters_start_and_serve_like_ten(tmp_path: Path, base: BaseModel, figures: Figures) -> None:
    seen = {FEW: Seen(), MANY: Seen()}
    for number in seen:
        registry = Registry(tmp_path / str(number) / "registry")
        for seed in range(number):
            publish_random(registry, base, f"adapter{seed}", rank=4, seed=seed)
    for repeat in range(REPEATS):
        for number in (FEW, MANY) if repeat % 2 == 0 else (MANY, FEW):  # the machine's pace drifts
            await measure(tmp_path / str(number), seen[number])
    ratios = {
        what: min(getattr(seen[MANY], what)) / min(getattr(seen[FEW], what))
        for what in ("starts", "first_tokens", "answers")
    }
    figures.record(
        f"{MANY} adapters against {FEW}",
        repeats=REPEATS,
        start_seconds_few=min(seen[FEW].starts),
        start_seconds_many=min(seen[MANY].starts),
        first_token_p50_ms_few=1000 * min(seen[FEW].first_tokens),
        first_token_p50_ms_many=1000 * min(seen[MANY].first_tokens),
        answer_p50_ms_few=1000 * min(seen[FEW].answers),
        answer_p50_ms_many=1000 * min(seen[MANY].answers),
        **{f"ratio_{what}": ratio for what, ratio in ratios.items()},
    )
    assert all(ratio <= MOST_SLOWDOWN for ratio in ratios.values()), ratios


async def measure(data_dir: Path, seen: Seen) -> None:
    """One start and one load of eight streams over four adapters and the base."""
    with running(data_dir, *ENGINE_ARGUMENTS) as service:
        revisions = [service.registry.artifacts(f"adapter{number}")[0].revision for number in range(NUM_USED)]
        models = ["capo-tiny", *revisions]
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
            stream = http_client(session, service.url, ignore_eos=True)
            for model in models:
                assert (await stream(model, "Who are you?", 4)).is_whole
            until = time.monotonic() + SECONDS
            first_tokens: list[float] = []
            answers: list[float] = []

            async def keep_streaming(number: int) -> None:
                while time.monotonic() < until:
                    answer = await stream(models[number % len(models)], f"{number}: who are you?", STREAM_TOKENS)
                    assert answer.is_whole
                    first_tokens.append(answer.first_token_at - answer.began_at)
                    answers.append(answer.ended_at - answer.began_at)

            await asyncio.gather(*(keep_streaming(number) for number in range(NUM_STREAMS)))
        seen.starts.append(service.start_seconds)
        seen.first_tokens.append(percentile(first_tokens, 0.5))
        seen.answers.append(percentile(answers, 0.5))
