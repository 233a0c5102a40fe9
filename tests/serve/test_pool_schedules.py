"""The pool under random schedules: users who give up, withdrawals, pins that come and go, engines that die."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from registry import errors
from serve.engine_api import EngineAdapter
from serve.metrics import Metrics
from serve.pool import AdapterPool
from serve.resident import AdapterState
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_pool import OpenGate, fake_artifact
from tests.sizes import size

SECONDS = 0.4
MAX_WAIT_SECONDS = 3.0
"""Far above what a turn of everybody takes; whoever waits so long starves."""


class SlowEngine(FakeEngine):
    """Loads and unloads take a moment, so that everything can come between."""

    def __init__(self, rng: random.Random, *, max_loras: int) -> None:
        super().__init__(max_loras=max_loras)
        self._rng = rng
        self.on_unload: Any = lambda adapter: None

    async def load_adapter(self, adapter: EngineAdapter) -> None:
        life = self.starts
        await asyncio.sleep(self._rng.uniform(0, 0.004))
        self._require_life(life)  # what was asked of an engine that died never reaches the next one
        await super().load_adapter(adapter)

    async def unload_adapter(self, adapter: EngineAdapter) -> None:
        self.on_unload(adapter)
        life = self.starts
        await asyncio.sleep(self._rng.uniform(0, 0.002))
        self._require_life(life)
        await super().unload_adapter(adapter)


@dataclass
class Schedule:
    """One run: clients that ask for random adapters while an operator pins, withdraws and, perhaps, the engine dies."""

    seed: int
    engine_dies: bool = False
    served: Counter[str] = field(default_factory=Counter)
    gave_up: int = 0
    violations: list[str] = field(default_factory=list)

    async def run(self) -> None:
        rng = random.Random(self.seed)
        self.rng = rng
        self.engine = SlowEngine(rng, max_loras=rng.randint(1, 4))
        self.revisions = [f"a{number}@1" for number in range(rng.randint(2, 9))]
        gate = OpenGate()
        gate.refuse.add("bad@1")
        await self.engine.start()
        self.pool = AdapterPool(
            self.engine,
            gate,  # type: ignore[arg-type]
            Metrics(CollectorRegistry()),
            max_wait_seconds=MAX_WAIT_SECONDS,
            turn_seconds=rng.choice([0.0, 0.005, 0.02]),
        )
        self.pinned: set[str] = set()
        self.may_leave: set[int] = set()
        self.engine.on_unload = self._check_unload
        self.stop = asyncio.Event()
        runner = asyncio.create_task(self.pool.run())
        tasks = [asyncio.create_task(self._client(number)) for number in range(rng.randint(2, 16))]
        tasks.append(asyncio.create_task(self._operator()))
        await asyncio.sleep(SECONDS)
        self.stop.set()
        await asyncio.gather(*tasks)
        await self._check_rest()
        runner.cancel()

    def _check_unload(self, adapter: EngineAdapter) -> None:
        if adapter.name in self.pinned and adapter.engine_id not in self.may_leave:
            self.violations.append(f"pinned {adapter.name} was unloaded")

    async def _client(self, number: int) -> None:
        rng = random.Random(f"{self.seed}-{number}")
        favourite = rng.choice(self.revisions)
        while not self.stop.is_set():
            revision = favourite if rng.random() < 0.6 else rng.choice([*self.revisions, "bad@1"])
            patience = rng.choice([None, None, 0.003, 0.01])
            with contextlib.suppress(errors.EngineDeadError):
                try:
                    async with asyncio.timeout(patience):
                        await self._use(revision, rng.uniform(0, 0.006))
                except TimeoutError:
                    self.gave_up += 1
                except errors.InvalidArtifactError:
                    assert revision == "bad@1"
                except errors.UnavailableError as error:
                    if isinstance(error, errors.EngineDeadError):
                        raise
                    self.violations.append(f"{revision} starved: {error}")
            if rng.random() < 0.2:
                await asyncio.sleep(rng.uniform(0, 0.01))

    async def _use(self, revision: str, seconds: float) -> None:
        life = self.engine.starts
        async with self.pool.use(fake_artifact(revision)) as adapter:
            for _ in range(3):
                if life == self.engine.starts and not self.engine.is_dead:
                    held = self.engine.loaded.get(adapter.engine_id)
                    if held is None or held.name != revision:
                        self.violations.append(f"the user of {revision} ran on {held}")
                await asyncio.sleep(seconds / 3)
            self.served[revision] += 1

    async def _operator(self) -> None:
        while not self.stop.is_set():
            await asyncio.sleep(self.rng.uniform(0, 0.03))
            action = self.rng.random()
            if action < 0.5:
                self.pinned = set(
                    self.rng.sample(
                        self.revisions, min(self.pool.max_pins, self.rng.randint(0, 3), len(self.revisions))
                    )
                )
                # What began to leave before it was pinned goes its way; its next user loads it anew.
                self.may_leave |= {
                    r.adapter.engine_id for r in self.pool.residents() if r.state is AdapterState.DRAINING
                }
                self.may_leave |= set(self.engine.loaded) - {r.adapter.engine_id for r in self.pool.residents()}
                self.pool.pin(self.pinned)
            elif action < 0.7:
                revision = self.rng.choice(self.revisions)
                self.may_leave |= {
                    r.adapter.engine_id for r in self.pool.residents() if r.artifact.revision == revision
                }
                self.pool.withdraw(revision)
            elif action < 0.8:
                await self.pool.preload(fake_artifact(self.rng.choice(self.revisions)))
            elif action < 0.85 and self.engine_dies:
                self.engine.die()
                await asyncio.sleep(0.005)
                self.pool.forget_all()
                await self.engine.start()

    async def _check_rest(self) -> None:
        """With nobody left, the books agree with the engine, and every adapter can still be had."""
        for revision in self.revisions:
            await self._use(revision, 0)
        async with asyncio.timeout(2):
            while any(r.state is AdapterState.DRAINING for r in self.pool.residents()):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        residents = list(self.pool.residents())
        assert {r.adapter.engine_id for r in residents} == set(self.engine.loaded)
        assert self.pool._slots_in_use == len(self.engine.loaded)
        assert not self.pool._line
        assert all(r.users == 0 for r in residents)
        assert self.engine.most_loaded <= self.engine.limits.max_loras


@pytest.mark.parametrize("engine_dies", [False, True])
@pytest.mark.parametrize("block", range(size(1, 8)))
async def test_slots_pins_users_and_turns_hold_under_random_schedules(block: int, engine_dies: bool) -> None:
    schedules = [Schedule(seed, engine_dies) for seed in range(block * 8, block * 8 + 8)]
    for schedule in schedules:
        async with asyncio.timeout(30):
            await schedule.run()
        assert schedule.violations == [], f"seed {schedule.seed}"
    assert sum(sum(s.served.values()) for s in schedules) > 300
    assert sum(s.gave_up for s in schedules) > 30
