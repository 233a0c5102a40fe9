"""The pool under random schedules in which long streams hold slots while cold adapters arrive."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from registry import errors
from serve.engine_api import EngineAdapter
from serve.metrics import Metrics
from serve.pool import AdapterPool
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_pool import OpenGate, fake_artifact
from tests.serve.virtual_time import run_in_virtual_time
from tests.sizes import size

SECONDS = 8.0
MAX_WAIT_SECONDS = 1.2
SLACK_SECONDS = 0.01
"""Between two things that follow from each other; loading takes no time here."""


@dataclass
class Use:
    """One request: when it came, when its revision got into the line it waited in, and when it was served."""

    revision: str
    arrived_at: float
    in_line_since: float
    began_at: float | None = None
    ended_at: float | None = None

    @property
    def has_waited(self) -> bool:
        return self.began_at is not None and self.began_at - self.arrived_at > 0.001


@dataclass
class Streams:
    """As many hot adapters as slots, one long stream after another on all but one of them, and single cold requests.

    Most streams last longer than anybody waits. ``all_long``: no adapter is without, and often no slot can be freed.
    """

    seed: int
    all_long: bool
    served: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    waiting: dict[str, tuple[int, float]] = field(default_factory=dict)
    """By revision: how many wait for it, and since when there has been somebody."""
    waited_until: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        rng = random.Random(self.seed)
        self.engine = FakeEngine(max_loras=rng.randint(2, 4))
        self.turn_seconds = rng.choice([0.0, 0.02, 0.1])
        await self.engine.start()
        self.pool = AdapterPool(
            self.engine,
            OpenGate(),  # type: ignore[arg-type]
            Metrics(CollectorRegistry()),
            max_wait_seconds=MAX_WAIT_SECONDS,
            turn_seconds=self.turn_seconds,
        )
        runner = asyncio.create_task(self.pool.run())
        self.stop_at = time.monotonic() + SECONDS
        hot = [f"hot{number}@1" for number in range(self.engine.limits.max_loras)]
        clients = [self._client(revision, (0.05, 0.1), (0.0, 0.01)) for revision in hot for _ in range(2)]
        longest = 2.5 * MAX_WAIT_SECONDS
        for revision in hot if self.all_long else hot[1:]:
            clients.append(self._client(revision, (0.4 * longest, longest), (0.0, 0.02)))
        for _ in range(rng.randint(1, 2)):
            clients.append(self._client(None, (0.0, 0.02), (0.0, MAX_WAIT_SECONDS)))
        await asyncio.gather(*clients)
        assert self.engine.most_loaded <= self.engine.limits.max_loras
        runner.cancel()

    async def _client(self, revision: str | None, seconds: tuple[float, float], pause: tuple[float, float]) -> None:
        """Uses ``revision``, or a cold one each time, again and again."""
        rng = random.Random(f"{self.seed}-{revision}-{seconds}-{len(asyncio.all_tasks())}")
        while time.monotonic() < self.stop_at:
            await self._use(revision or f"cold{rng.randint(0, 3)}@1", rng.uniform(*seconds))
            await asyncio.sleep(rng.uniform(*pause))

    async def _use(self, revision: str, seconds: float) -> None:
        now = time.monotonic()
        waiting, since = self.waiting.get(revision, (0, now))
        self.waiting[revision] = (waiting + 1, since)
        use = Use(revision, now, since)
        try:
            async with self.pool.use(fake_artifact(revision)) as adapter:
                self._end_waiting(revision)
                use.began_at = time.monotonic()
                self.uses.append(use)
                await asyncio.sleep(seconds)
                self._check_holds(adapter)
                use.ended_at = time.monotonic()
                self.served[revision.rstrip("0123456789@")] += 1
        except errors.UnavailableError:
            self._end_waiting(revision)
            self.refused[revision.rstrip("0123456789@")] += 1
            self._check_refusal(use)

    def _end_waiting(self, revision: str) -> None:
        waiting, since = self.waiting.pop(revision)
        if waiting > 1:
            self.waiting[revision] = (waiting - 1, since)
        self.waited_until[revision] = time.monotonic()

    def _check_holds(self, adapter: EngineAdapter) -> None:
        if self.engine.loaded.get(adapter.engine_id) != adapter:
            self.violations.append(f"{adapter.name} was unloaded under its user")

    def _check_refusal(self, refused: Use) -> None:
        now = time.monotonic()
        loaded = {adapter.name for adapter in self.engine.loaded.values()}
        if refused.revision in loaded:
            others = [r for r in self.waiting if r != refused.revision]
            others += [r for r, until in self.waited_until.items() if until > now - SLACK_SECONDS]
            if not set(others) - {refused.revision}:
                self.violations.append(f"{refused.revision} was refused, though in the engine and nobody else waits")
        elif len(loaded) == self.engine.limits.max_loras:
            for revision in loaded:
                if not self._is_held(revision, against=refused, now=now):
                    self.violations.append(f"{refused.revision} was refused, though {revision} could have left")

    def _is_held(self, revision: str, *, against: Use, now: float) -> bool:
        """Whether a user still holds ``revision`` who began before it had to take no more for the sake of ``against``.

        That was in the middle of its wait, or at the end of the turn of somebody who was in line before.
        """
        uses = [use for use in self.uses if use.revision == revision and use.began_at is not None]
        turns = [
            use.began_at + self.turn_seconds
            for use in uses
            if use.began_at is not None and use.has_waited and use.in_line_since <= against.arrived_at
        ]
        last = max([now - MAX_WAIT_SECONDS / 2, *turns]) + SLACK_SECONDS
        return any(use.ended_at is None and use.began_at is not None and use.began_at <= last for use in uses)


@pytest.mark.parametrize("all_long", [False, True], ids=["one adapter without", "every adapter with"])
def test_long_streams_cost_others_no_more_than_their_slots(all_long: bool) -> None:
    schedules = [Streams(seed, all_long) for seed in range(size(40, 1000))]
    for schedule in schedules:
        run_in_virtual_time(schedule.run())
    for schedule in schedules:
        assert schedule.violations == [], f"seed {schedule.seed}"
        if not all_long:
            assert not schedule.refused, f"seed {schedule.seed}: a slot can always be freed in time"
    assert sum(schedule.served["cold"] for schedule in schedules) > 10
    assert not all_long or sum(schedule.refused["cold"] for schedule in schedules) > 3
