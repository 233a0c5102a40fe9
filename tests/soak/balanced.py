"""Load on a balancer, and what became of each request."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx


@dataclass(frozen=True)
class Sent:
    """``end``: ``whole``; ``cut`` (a stream that had begun and broke off or told of an error); else what went wrong."""

    end: str
    is_stream: bool
    served_by: str
    model: str


@dataclass
class Load:
    """``streams`` clients that ask one after another until told to stop; every second request is a stream."""

    url: str
    models: Sequence[str]
    streams: int
    done: list[Sent] = field(default_factory=list)
    _is_over: bool = False

    def stop(self) -> None:
        self._is_over = True

    def failed(self) -> list[Sent]:
        return [sent for sent in self.done if sent.end not in ("whole", "cut")]

    def cut(self) -> list[Sent]:
        return [sent for sent in self.done if sent.end == "cut"]

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._client(client, number) for number in range(self.streams)))

    async def more(self, count: int) -> None:
        """Until so many further requests have ended."""
        wanted = len(self.done) + count
        async with asyncio.timeout(120):
            while len(self.done) < wanted:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.02)

    async def until(self, seen: Callable[[Sent], bool]) -> None:
        """Until a request that ends from now on is such."""
        first = len(self.done)
        async with asyncio.timeout(60):
            while not any(map(seen, self.done[first:])):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def _client(self, client: httpx.AsyncClient, number: int) -> None:
        for turn in itertools.count():
            if self._is_over:
                return
            body = {
                "model": self.models[turn % len(self.models)],
                "prompt": f"{number} {turn}",
                "max_tokens": 24,
                "ignore_eos": True,
                "stream": turn % 2 == 0,
            }
            self.done.append(await _ask(client, body))

    def summary(self) -> dict[str, int]:
        return dict(Counter(sent.end for sent in self.done))


async def _ask(client: httpx.AsyncClient, body: dict[str, object]) -> Sent:
    is_stream = bool(body["stream"])
    served_by = ""
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            served_by = response.headers.get("x-served-by", "")
            if response.status_code != 200:
                return Sent(f"{response.status_code} {(await response.aread())[:200]!r}", is_stream, served_by, "")
            lines = [line async for line in response.aiter_lines() if line]
    except httpx.HTTPError as error:
        # Without a header nothing had begun; the balancer should have asked the other replica.
        end = "cut" if is_stream and served_by else f"{type(error).__name__} {error}"
        return Sent(end, is_stream, served_by, "")
    if not is_stream:
        return Sent("whole", is_stream, served_by, json.loads("".join(lines))["model"])
    if lines[-1] != "data: [DONE]":
        return Sent("cut", is_stream, served_by, "")
    return Sent("whole", is_stream, served_by, json.loads(lines[0].removeprefix("data: "))["model"])
