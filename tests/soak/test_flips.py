"""Aliases flip and adapters load while clients stream: nobody gets an error, a stale revision or a mixture."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import grpc
import pytest

from registry import BaseModel
from tests.e2e.service import Service
from tests.sizes import size
from tests.soak.adapters import published
from tests.soak.answers import Answer, Ask, Question, ask_questions, grpc_client, http_client
from tests.soak.figures import Figures

pytestmark = pytest.mark.engine

NUM_FLIPS = size(30, 1000)
NUM_HTTP_CLIENTS, NUM_GRPC_CLIENTS = 13, 3
NUM_REVISIONS = 4
NUM_QUESTIONS = size(4, 16)
LEAST_TOKENS, MOST_TOKENS = 4, size(16, 32)
PAUSE_SECONDS = 0.05
ALIAS = "flipping"


@dataclass(frozen=True, slots=True)
class Flip:
    revision: str
    sent_at: float
    acknowledged_at: float


@dataclass(frozen=True, slots=True)
class Asked:
    question: Question
    max_tokens: int
    answer: Answer


def allowed_revisions(flips: Sequence[Flip], answer: Answer) -> set[str]:
    """What the alias may have meant between the beginning of a request and its first token.

    Not older than the last flip that was acknowledged before the request began; not newer than one that was sent
    before its first token.
    """
    latest = max(place for place, flip in enumerate(flips) if flip.acknowledged_at <= answer.began_at)
    return {flip.revision for flip in flips[latest:] if flip.sent_at <= answer.first_token_at}


async def test_flips_under_streams_fail_nothing_and_mix_nothing(
    service: Service, base: BaseModel, figures: Figures
) -> None:
    names = ["flipped"] * NUM_REVISIONS
    with published(service.registry, base, names, rank=8) as artifacts:
        revisions = [artifact.revision for artifact in artifacts]
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session,
            grpc.aio.insecure_channel(service.grpc_address) as channel,
        ):
            questions = await ask_questions(
                session,
                service.url,
                ["capo-tiny", *revisions],
                wanted=NUM_QUESTIONS,
                least_tokens=LEAST_TOKENS,
                most_tokens=MOST_TOKENS,
            )
            flips = [await flip(session, service.url, revisions[0])]
            stop = asyncio.Event()
            clients = [http_client(session, service.url)] * NUM_HTTP_CLIENTS + [grpc_client(channel)] * NUM_GRPC_CLIENTS
            streams = [
                asyncio.create_task(keep_asking(client, questions, stop, seed)) for seed, client in enumerate(clients)
            ]
            began_at = time.monotonic()
            for number in range(1, NUM_FLIPS + 1):
                flips.append(await flip(session, service.url, revisions[number % NUM_REVISIONS]))
                await asyncio.sleep(PAUSE_SECONDS)
            seconds = time.monotonic() - began_at
            stop.set()
            asked = [one for stream in await asyncio.gather(*streams) for one in stream]
    failed = [one.answer for one in asked if not one.answer.is_whole]
    mixed = [
        one for one in asked if one.answer.is_whole and not one.question.is_answered_by(one.answer, one.max_tokens)
    ]
    stale = [one.answer for one in asked if one.answer.model not in allowed_revisions(flips, one.answer)]
    by_revision = Counter(one.answer.model for one in asked)
    figures.record(
        "alias flips under 16 streams",
        flips=NUM_FLIPS,
        seconds=seconds,
        answers=len(asked),
        failed=len(failed),
        mixed=len(mixed),
        stale=len(stale),
        tokens_per_second=sum(len(one.answer.token_ids) for one in asked) / seconds,
        acknowledged_after_median_seconds=sorted(f.acknowledged_at - f.sent_at for f in flips)[len(flips) // 2],
        acknowledged_after_longest_seconds=max(f.acknowledged_at - f.sent_at for f in flips),
    )
    assert failed == []
    assert mixed == []
    assert stale == []
    assert set(by_revision) == set(revisions), "not every revision was asked, so little was shown"
    assert len(asked) > NUM_FLIPS


async def flip(session: aiohttp.ClientSession, url: str, revision: str) -> Flip:
    sent_at = time.monotonic()
    async with session.put(f"{url}/v1/aliases/{ALIAS}", json={"revision": revision}) as response:
        response.raise_for_status()
        await response.read()
    return Flip(revision, sent_at, time.monotonic())


async def keep_asking(ask: Ask, questions: Sequence[Question], stop: asyncio.Event, seed: int) -> list[Asked]:
    random_of = random.Random(seed)
    asked: list[Asked] = []
    while not stop.is_set():
        question = random_of.choice(questions)
        max_tokens = random_of.randint(LEAST_TOKENS, question.num_tokens)
        asked.append(Asked(question, max_tokens, await ask(ALIAS, question.prompt, max_tokens)))
    return asked


def test_the_checks_of_this_proof_find_stale_and_mixed_answers() -> None:
    flips = [Flip("a", 0.0, 1.0), Flip("b", 2.0, 3.0), Flip("c", 4.0, 5.0)]

    def seen(model: str, began_at: float, first_token_at: float) -> bool:
        answer = Answer(began_at, model=model, first_token_at=first_token_at)
        return answer.model in allowed_revisions(flips, answer)

    assert seen("a", 1.5, 1.9)
    assert not seen("b", 1.5, 1.9), "nobody had asked for b yet"
    assert seen("a", 2.5, 2.9)
    assert seen("b", 2.5, 2.9), "the flip was on its way"
    assert not seen("a", 3.1, 3.5), "the flip was acknowledged before the request began"
    assert seen("c", 3.5, 4.5)
    question = Question("?", 3, {"a": (1, 2, 3), "b": (1, 5, 6)})

    def answered(*token_ids: int, max_tokens: int = 3) -> bool:
        return question.is_answered_by(Answer(0.0, model="a", token_ids=[*token_ids], is_whole=True), max_tokens)

    assert answered(1, 2, 3)
    assert answered(1, 2, max_tokens=2)
    assert not answered(1, 2, 6), "it goes on as another revision would"
    assert not answered(1, 2), "a token is missing"
    assert not answered(1, 5, 6), "these are the tokens of another revision"
