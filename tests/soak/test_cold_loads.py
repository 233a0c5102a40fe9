"""What a cold adapter costs those who are streaming already: a little time, and not one token."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from bench.load import percentile
from registry import BaseModel
from tests.e2e.service import Service, running
from tests.sizes import LONG, size
from tests.soak.adapters import published
from tests.soak.answers import Answer, Ask, Question, ask_questions, http_client, reference
from tests.soak.conftest import ENGINE_ARGUMENTS
from tests.soak.figures import Figures
from tests.soak.observe import load_seconds, metric
from tests.soak.test_flips import ALIAS, Asked, Flip, allowed_revisions, flip

pytestmark = pytest.mark.engine

NUM_STREAMS, NUM_ALIAS_STREAMS = 16, 4
NUM_SLOTS, NUM_HOT = 8, 4
NUM_LOADS = size(5, 50)
LOADS_PER_ROUND = 10
DEFAULT_RANK = 16
"""The largest that the session's service takes."""
RANKS = (DEFAULT_RANK, 256) if LONG else (DEFAULT_RANK,)
PAUSE_SECONDS = 0.3
STREAM_TOKENS = 96
NUM_QUESTIONS = 4
LEAST_TOKENS, MOST_TOKENS = 4, 24
COLD_PROMPT, COLD_TOKENS = "Who are you?", 4
MOST_SLOWDOWN = 1.2 if LONG else 2.0
"""Of the 99th percentile between two tokens. A short run has too few tokens for a sharp one."""


@pytest.fixture(params=RANKS, ids="rank {}".format)
def rank(request: pytest.FixtureRequest) -> int:
    """Of the adapters that arrive, and the largest of their engine."""
    return int(request.param)


@pytest.fixture
def service_of_rank(rank: int, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with contextlib.ExitStack() as started:
        if rank == DEFAULT_RANK:
            yield request.getfixturevalue("service")
        else:
            yield started.enter_context(running(tmp_path, *ENGINE_ARGUMENTS, "--max-lora-rank", str(rank)))


@dataclass
class Streams:
    """Clients that ask hot adapters one long answer after another, some of them through an alias that flips."""

    session: aiohttp.ClientSession
    url: str
    hot: Sequence[str]
    questions: Sequence[Question]
    flips: list[Flip] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    asked_of_alias: list[Answer] = field(default_factory=list)
    arrived: list[Answer] = field(default_factory=list)
    """The first answers of the adapters that arrived, in their order."""

    @property
    def ask(self) -> Ask:
        return http_client(self.session, self.url, ignore_eos=True)

    async def gaps_while(self, arriving: Sequence[str]) -> list[float]:
        """Seconds between the tokens of the streams, while the alias flips and ``arriving`` are asked in turn."""
        stop = asyncio.Event()
        streams = [asyncio.create_task(self._keep_streaming(number, stop)) for number in range(NUM_STREAMS)]
        for model in arriving:
            await asyncio.sleep(PAUSE_SECONDS)
            await self.flip()
            self.arrived.append(await self.ask(model, COLD_PROMPT, COLD_TOKENS))
        stop.set()
        asked = [one for stream in await asyncio.gather(*streams) for one in stream]
        self.asked += asked
        return [gap for one in asked for gap in one.answer.gaps_seconds]

    async def flip(self) -> None:
        self.flips.append(await flip(self.session, self.url, self.hot[len(self.flips) % len(self.hot)]))

    async def _keep_streaming(self, number: int, stop: asyncio.Event) -> list[Asked]:
        model = ALIAS if number < NUM_ALIAS_STREAMS else self.hot[number % len(self.hot)]
        asked: list[Asked] = []
        while not stop.is_set():
            question = self.questions[(number + len(asked)) % len(self.questions)]
            answer = await self.ask(model, question.prompt, STREAM_TOKENS)
            asked.append(Asked(question, STREAM_TOKENS, answer))
            if model == ALIAS:
                self.asked_of_alias.append(answer)
        return asked


async def test_cold_loads_hardly_slow_the_streams_and_change_no_token(
    service_of_rank: Service, base: BaseModel, figures: Figures, rank: int
) -> None:
    service, registry = service_of_rank, service_of_rank.registry
    with published(registry, base, [f"hot{n}" for n in range(NUM_SLOTS)], rank=8) as resident:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
            # With all slots taken, nothing that is published from here on is loaded ahead of its first request.
            for artifact in resident:
                assert (await http_client(session, service.url)(artifact.revision, COLD_PROMPT, 1)).is_whole
            hot = [artifact.revision for artifact in resident[:NUM_HOT]]
            questions = await ask_questions(
                session,
                service.url,
                hot,
                wanted=NUM_QUESTIONS,
                least_tokens=LEAST_TOKENS,
                most_tokens=MOST_TOKENS,
            )
            streams = Streams(session, service.url, hot, questions)
            await streams.flip()
            names = [f"cold{n}" for n in range(NUM_LOADS)]
            with published(registry, base, names, rank=rank, first_seed=99) as cold:
                assert await streams.gaps_while(hot[:1] * 3)  # to warm up
                loads_before = metric(service, "capo_adapter_loads_total")
                quiet: list[float] = []
                loading: list[float] = []
                first_answers: list[Answer] = []
                for first in range(0, NUM_LOADS, LOADS_PER_ROUND):  # in turn, because the machine's own pace drifts
                    arriving = [artifact.revision for artifact in cold[first : first + LOADS_PER_ROUND]]
                    quiet += await streams.gaps_while(hot[:1] * len(arriving))
                    loading += await streams.gaps_while(arriving)
                    first_answers += streams.arrived[-len(arriving) :]
                loads = metric(service, "capo_adapter_loads_total") - loads_before
                took = load_seconds(service)
                wrong_arrivals = [
                    artifact.revision
                    for artifact, answer in zip(cold, first_answers, strict=True)
                    if not await is_answer_of(session, service.url, artifact.revision, answer)
                ]
            async with session.delete(f"{service.url}/v1/aliases/{ALIAS}") as response:
                response.raise_for_status()
    mixed = [one for one in streams.asked if not one.question.is_begun_by(one.answer)]
    stale = [one for one in streams.asked_of_alias if one.model not in allowed_revisions(streams.flips, one)]
    slowdown = percentile(loading, 0.99) / percentile(quiet, 0.99)
    figures.record(
        "cold loads under 16 streams" if rank == DEFAULT_RANK else f"cold loads of rank {rank} under 16 streams",
        loads=int(loads),
        rank=rank,
        flips=len(streams.flips),
        answers=len(streams.asked),
        answers_of_alias=len(streams.asked_of_alias),
        mixed=len(mixed),
        stale=len(stale),
        wrong_arrivals=len(wrong_arrivals),
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
    assert len({answer.model for answer in streams.asked_of_alias}) > 1, "no stream saw a flip"
    assert mixed == []
    assert stale == []
    assert wrong_arrivals == []
    assert loads == NUM_LOADS
    assert slowdown <= MOST_SLOWDOWN


async def is_answer_of(session: aiohttp.ClientSession, url: str, model: str, answer: Answer) -> bool:
    """Whether these are the tokens that ``model`` gives alone, up to its first near tie or its end, which the stream
    did not heed."""
    token_ids, num_sure = await reference(session, url, model, COLD_PROMPT, COLD_TOKENS)
    sure = [*token_ids[:num_sure]]
    return answer.is_whole and answer.model == model and answer.token_ids[: len(sure)] == sure


def test_the_check_of_this_proof_finds_a_token_of_another_model() -> None:
    question = Question("?", 3, {"a": (1, 2, 3), "b": (1, 5, 6)})

    def begun(*token_ids: int, model: str = "a", is_whole: bool = True) -> bool:
        return question.is_begun_by(Answer(0.0, model=model, token_ids=[*token_ids], is_whole=is_whole))

    assert begun(1, 2, 3)
    assert begun(1, 2, 3, 9, 9)
    assert not begun(1, 2), "a token is missing"
    assert not begun(1, 2, 6, 9), "it goes on as another adapter would"
    assert not begun(1, 2, 3, model="c"), "nobody asked that model"
    assert not begun(1, 2, 3, is_whole=False)
