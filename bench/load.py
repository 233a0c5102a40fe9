"""A closed loop of streaming clients, and what they saw."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import grpc

from capo_proto.v1 import inference_pb2, inference_pb2_grpc

PROMPT = "In the village there is a mill and beside the mill there is a garden where the children play. "
MAX_TOKENS = 64

Client = Callable[[str, int], AsyncIterator[int]]
"""Streams one answer of a model to the n-th prompt; yields the number of new tokens of each event."""


@dataclass(slots=True)
class Seen:
    """Times in seconds."""

    time_to_first_token: list[float] = field(default_factory=list)
    inter_token: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def drive(client: Client, models: Sequence[str], *, concurrency: int, seconds: float) -> Seen:
    """Keep ``concurrency`` streams open for ``seconds``, models in turn; every prompt is new to the prefix cache."""
    seen = Seen()
    numbers = itertools.count()
    began = time.perf_counter()

    async def keep_asking() -> None:
        while time.perf_counter() - began < seconds:
            number = next(numbers)
            sent = last = time.perf_counter()
            is_first = True
            async for new_tokens in client(models[number % len(models)], number):
                now = time.perf_counter()
                if is_first:
                    seen.time_to_first_token.append(now - sent)
                    is_first = False
                elif new_tokens:
                    seen.inter_token.append((now - last) / new_tokens)
                seen.tokens += new_tokens
                last = now

    await asyncio.gather(*(keep_asking() for _ in range(concurrency)))
    seen.seconds = time.perf_counter() - began
    return seen


def prompt_of(number: int) -> str:
    """About 60 tokens, different from the first one on."""
    return f"{number} " + 3 * PROMPT


def http_chat(session: aiohttp.ClientSession, url: str) -> Client:
    """``/v1/chat/completions`` as server-sent events; each event counts as one token, as both servers send them."""

    async def ask(model: str, number: int) -> AsyncIterator[int]:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt_of(number)}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        counted = 0
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                # The running count stands in every event, so nothing has to be guessed from the text.
                marker = line.find(b'"completion_tokens":')
                if marker >= 0:
                    count = int(line[marker + 20 :].split(b",", 1)[0].split(b"}", 1)[0])
                    if count > counted:
                        yield count - counted
                        counted = count

    return ask


def grpc_chat(channel: grpc.aio.Channel) -> Client:
    """``capo.v1.Inference/ChatStream``."""
    stub = inference_pb2_grpc.InferenceStub(channel)

    async def ask(model: str, number: int) -> AsyncIterator[int]:
        request = inference_pb2.ChatRequest(
            model=model,
            messages=[inference_pb2.Message(role="user", content=prompt_of(number))],
            sampling=inference_pb2.Sampling(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True),
        )
        async for chunk in stub.ChatStream(request):
            if chunk.num_tokens:
                yield chunk.num_tokens

    return ask
