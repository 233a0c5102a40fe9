"""The adapter pool: residency, eviction, fairness, refusal."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from registry import errors
from serve.metrics import Metrics
from serve.pool import AdapterPool
from serve.resident import AdapterState
from tests.serve.fake_engine import FakeEngine


@dataclass(frozen=True)
class _Artifact:
    revision: str
    path: Path = Path("nowhere")

    @property
    def name(self) -> str:
        return self.revision.partition("@")[0]


def fake_artifact(revision: str) -> Any:
    """As much of an artifact as the pool reads."""
    return _Artifact(revision)


class OpenGate:
    """A gate that refuses what it was told to."""

    def __init__(self) -> None:
        self.refuse: set[str] = set()
        self.fail_probe: set[str] = set()
        self.gone: set[str] = set()
        self.forgotten: list[str] = []

    async def check(self, artifact: Any, limits: Any) -> None:
        if artifact.revision in self.refuse:
            raise errors.InvalidArtifactError("not this one", code="not_finite")

    async def require_there(self, artifact: Any) -> None:
        if artifact.revision in self.gone:
            raise errors.ModelNotFoundError("it is gone")

    async def probe(self, artifact: Any, engine: Any, adapter: Any) -> float | None:
        if artifact.revision in self.fail_probe:
            raise errors.InvalidArtifactError("answers differ", code="probe_mismatch")
        return None

    def notes(self, revision: str) -> tuple[str, ...]:
        return ()

    def forget(self, revision: str) -> None:
        self.forgotten.append(revision)


class SlowGate(OpenGate):
    """Takes until ``go_on`` for one revision."""

    def __init__(self, revision: str) -> None:
        super().__init__()
        self._revision = revision
        self.go_on = asyncio.Event()

    async def check(self, artifact: Any, limits: Any) -> None:
        if artifact.revision == self._revision:
            await self.go_on.wait()
        await super().check(artifact, limits)


@contextlib.asynccontextmanager
async def running_pool(
    engine: FakeEngine, gate: OpenGate | None = None, **options: float
) -> AsyncIterator[AdapterPool]:
    await engine.start()
    judge: Any = gate or OpenGate()
    pool = AdapterPool(engine, judge, Metrics(CollectorRegistry()), **options)
    task = asyncio.create_task(pool.run())
    try:
        yield pool
    finally:
        task.cancel()


async def use_once(pool: AdapterPool, revision: str) -> int:
    async with pool.use(fake_artifact(revision)) as adapter:
        return adapter.engine_id


async def hold(pool: AdapterPool, revision: str, until: asyncio.Event, holding: asyncio.Event) -> None:
    async with pool.use(fake_artifact(revision)):
        holding.set()
        await until.wait()


async def test_an_adapter_is_loaded_once_for_many_concurrent_users() -> None:
    engine = FakeEngine()
    engine.load_gate.clear()
    async with running_pool(engine) as pool:
        users = [asyncio.create_task(use_once(pool, "a@1")) for _ in range(20)]
        await asyncio.sleep(0.01)
        engine.load_gate.set()
        assert len(set(await asyncio.gather(*users))) == 1
        assert engine.loads == ["a@1"]


async def test_the_least_recently_used_idle_adapter_makes_room() -> None:
    engine = FakeEngine(max_loras=2)
    async with running_pool(engine) as pool:
        for revision in ("a@1", "b@1", "a@1", "c@1"):
            await use_once(pool, revision)
        assert engine.unloads == ["b@1"]
        assert {adapter.name for adapter in engine.loaded.values()} == {"a@1", "c@1"}


async def test_the_engine_never_holds_more_adapters_than_it_has_slots() -> None:
    engine = FakeEngine(max_loras=3)
    async with running_pool(engine, turn_seconds=0.01) as pool:
        await asyncio.gather(*(use_once(pool, f"a{n % 11}@1") for n in range(200)))
        assert engine.most_loaded <= 3


async def test_engine_ids_are_never_used_twice() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine) as pool:
        ids = [await use_once(pool, revision) for revision in ("a@1", "b@1") * 10]
        assert len(set(ids)) == 20


async def test_a_hot_adapter_cannot_starve_a_cold_one() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine, turn_seconds=0.05) as pool:
        stop = asyncio.Event()

        async def hot_client() -> None:
            while not stop.is_set():
                async with pool.use(fake_artifact("hot@1")):
                    await asyncio.sleep(0.01)

        clients = [asyncio.create_task(hot_client()) for _ in range(8)]
        await asyncio.sleep(0.02)
        async with asyncio.timeout(0.5):
            await use_once(pool, "cold@1")
        stop.set()
        await asyncio.gather(*clients)


async def test_users_finish_on_a_draining_adapter_while_later_ones_wait_in_line() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine, turn_seconds=0.0) as pool:
        let_go, holding = asyncio.Event(), asyncio.Event()
        user = asyncio.create_task(hold(pool, "hot@1", let_go, holding))
        await holding.wait()
        cold = asyncio.create_task(use_once(pool, "cold@1"))
        await asyncio.sleep(0.02)
        assert pool.status("hot@1").state is AdapterState.DRAINING
        later = asyncio.create_task(use_once(pool, "hot@1"))
        await asyncio.sleep(0.02)
        assert not cold.done()
        assert not later.done()
        let_go.set()
        await asyncio.gather(user, cold, later)
        assert engine.loads == ["hot@1", "cold@1", "hot@1"]


async def test_one_long_stream_holds_its_own_slot_only() -> None:
    engine = FakeEngine(max_loras=2)
    async with running_pool(engine, max_wait_seconds=1, turn_seconds=0.05) as pool:
        let_go, holding, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()
        stream = asyncio.create_task(hold(pool, "streaming@1", let_go, holding))
        await holding.wait()

        async def hot_client() -> None:
            while not stop.is_set():
                async with pool.use(fake_artifact("hot@1")):
                    await asyncio.sleep(0.02)

        clients = [asyncio.create_task(hot_client()) for _ in range(3)]
        await asyncio.sleep(0.1)
        await use_once(pool, "cold@1")
        await use_once(pool, "streaming@1")
        stop.set()
        await asyncio.gather(*clients)
        assert engine.loads.count("streaming@1") == 1
        let_go.set()
        await stream


async def test_a_draining_adapter_is_taken_back_when_nobody_waits_any_more() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine, max_wait_seconds=0.1, turn_seconds=0.0) as pool:
        let_go, holding = asyncio.Event(), asyncio.Event()
        user = asyncio.create_task(hold(pool, "hot@1", let_go, holding))
        await holding.wait()
        cold = asyncio.create_task(use_once(pool, "cold@1"))
        await asyncio.sleep(0.02)
        assert pool.status("hot@1").state is AdapterState.DRAINING
        with pytest.raises(errors.UnavailableError):
            await cold
        await use_once(pool, "hot@1")
        assert pool.status("hot@1").state is AdapterState.LOADED
        let_go.set()
        await user
        assert engine.loads == ["hot@1"]


async def test_a_draining_adapter_is_taken_back_for_its_own_users_when_they_are_next_in_line() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine, turn_seconds=0.0) as pool:
        let_go, holding = asyncio.Event(), asyncio.Event()
        user = asyncio.create_task(hold(pool, "hot@1", let_go, holding))
        await holding.wait()
        cold = asyncio.create_task(use_once(pool, "cold@1"))
        await asyncio.sleep(0.02)
        later_let_go, later_holding = asyncio.Event(), asyncio.Event()
        later = asyncio.create_task(hold(pool, "hot@1", later_let_go, later_holding))
        behind = asyncio.create_task(use_once(pool, "other@1"))
        await asyncio.sleep(0.02)
        cold.cancel()
        async with asyncio.timeout(1):
            await later_holding.wait()
        let_go.set()
        await user
        await asyncio.sleep(0.02)
        assert engine.unloads == [], "its later user still holds it"
        later_let_go.set()
        await asyncio.gather(later, behind)
        assert engine.loads == ["hot@1", "other@1"]


async def test_an_adapter_that_was_withdrawn_while_it_drained_is_not_taken_back() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine, max_wait_seconds=0.1, turn_seconds=0.0) as pool:
        let_go, holding = asyncio.Event(), asyncio.Event()
        user = asyncio.create_task(hold(pool, "hot@1", let_go, holding))
        await holding.wait()
        cold = asyncio.create_task(use_once(pool, "cold@1"))
        await asyncio.sleep(0.02)
        pool.withdraw("hot@1")
        with pytest.raises(errors.UnavailableError):
            await cold
        assert pool.status("hot@1").state is AdapterState.DRAINING
        let_go.set()
        await user
        await asyncio.sleep(0.02)
        assert engine.loaded == {}


async def test_waiting_for_a_slot_ends_with_a_retryable_error() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine, max_wait_seconds=0.05, turn_seconds=60) as pool:
        let_go, holding = asyncio.Event(), asyncio.Event()
        user = asyncio.create_task(hold(pool, "hot@1", let_go, holding))
        await holding.wait()
        with pytest.raises(errors.UnavailableError) as caught:
            await use_once(pool, "cold@1")
        assert caught.value.code == "adapter_slots_busy"
        assert caught.value.retry_after_seconds is not None
        let_go.set()
        await user


@pytest.mark.parametrize(("slow", "waits_for"), [("gate", "were still being checked"), ("engine", "still loading it")])
async def test_a_wait_that_was_not_for_a_slot_says_what_it_was_for(slow: str, waits_for: str) -> None:
    engine, gate = FakeEngine(), SlowGate("a@1")
    if slow == "engine":
        gate.go_on.set()
        engine.load_gate.clear()
    async with running_pool(engine, gate, max_wait_seconds=0.05) as pool:
        with pytest.raises(errors.UnavailableError, match=waits_for) as caught:
            await use_once(pool, "a@1")
        assert caught.value.code == "adapter_load_slow"
        assert caught.value.retry_after_seconds is not None
        assert "slot" not in caught.value.message


async def test_a_cancelled_waiter_leaves_the_slots_as_they_were() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine, turn_seconds=60) as pool:
        let_go, holding = asyncio.Event(), asyncio.Event()
        user = asyncio.create_task(hold(pool, "a@1", let_go, holding))
        await holding.wait()
        waiter = asyncio.create_task(use_once(pool, "b@1"))
        await asyncio.sleep(0.01)
        waiter.cancel()
        let_go.set()
        await user
        for revision in ("c@1", "d@1", "b@1"):
            await use_once(pool, revision)
        assert len(engine.loaded) == 1


@pytest.mark.parametrize("stage", ["check", "engine", "probe"])
async def test_a_refused_adapter_is_remembered_with_its_reason_and_holds_no_slot(stage: str) -> None:
    engine, gate = FakeEngine(max_loras=1), OpenGate()
    {"check": gate.refuse, "engine": engine.refuse, "probe": gate.fail_probe}[stage].add("bad@1")
    async with running_pool(engine, gate) as pool:
        for _ in range(3):
            with pytest.raises(errors.InvalidArtifactError):
                await use_once(pool, "bad@1")
        status = pool.status("bad@1")
        assert status.state is AdapterState.REFUSED
        assert status.reason is not None
        assert engine.loaded == {}
        await use_once(pool, "good@1")


async def test_a_withdrawn_adapter_leaves_when_its_last_user_is_done() -> None:
    engine = FakeEngine()
    async with running_pool(engine) as pool:
        let_go, holding = asyncio.Event(), asyncio.Event()
        user = asyncio.create_task(hold(pool, "a@1", let_go, holding))
        await holding.wait()
        pool.withdraw("a@1")
        await asyncio.sleep(0.02)
        assert len(engine.loaded) == 1
        let_go.set()
        await user
        await asyncio.sleep(0.02)
        assert engine.loaded == {}


@pytest.mark.parametrize("is_refused", [False, True])
async def test_an_adapter_that_is_withdrawn_while_it_loads_serves_who_waits_and_leaves_nothing_behind(
    is_refused: bool,
) -> None:
    engine, gate = FakeEngine(), OpenGate()
    engine.refuse |= {"a@1"} if is_refused else set()
    engine.load_gate.clear()
    async with running_pool(engine, gate) as pool:
        user = asyncio.create_task(use_once(pool, "a@1"))
        await asyncio.sleep(0.02)
        pool.withdraw("a@1")
        gate.forgotten.clear()
        engine.load_gate.set()
        if is_refused:
            with pytest.raises(errors.ModelNotFoundError):
                await user
        else:
            await user
        await asyncio.sleep(0.02)
        assert engine.loaded == {}
        assert pool.status("a@1").state is AdapterState.AVAILABLE
        assert gate.forgotten == ["a@1"], "what the gate noted while it loaded"


async def test_preloading_never_evicts_anybody() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine) as pool:
        await use_once(pool, "a@1")
        await pool.preload(fake_artifact("b@1"))
        assert engine.loads == ["a@1"]


@contextlib.asynccontextmanager
async def preloading() -> AsyncIterator[tuple[FakeEngine, AdapterPool, SlowGate, asyncio.Task[bool]]]:
    """A pool of two slots with ``hot@1`` in one of them and ``new@1``, sent ahead for the other, still at the gate."""
    engine, gate = FakeEngine(max_loras=2), SlowGate("new@1")
    async with running_pool(engine, gate, turn_seconds=0.0) as pool:
        await use_once(pool, "hot@1")
        preload = asyncio.create_task(pool.preload(fake_artifact("new@1")))
        await asyncio.sleep(0.01)
        yield engine, pool, gate, preload


async def test_a_preload_whose_slot_goes_to_a_request_meanwhile_is_given_up() -> None:
    async with preloading() as (engine, pool, gate, preload):
        await use_once(pool, "other@1")
        gate.go_on.set()
        assert not await preload
        assert engine.unloads == []
        assert pool.status("new@1").state is AdapterState.AVAILABLE
        assert pool.num_free_slots == 0


async def test_a_preload_that_a_request_joins_takes_its_turn_like_any_other() -> None:
    async with preloading() as (engine, pool, gate, preload):
        joining = asyncio.create_task(use_once(pool, "new@1"))
        await use_once(pool, "other@1")
        gate.go_on.set()
        await joining
        assert await preload
        assert engine.unloads == ["hot@1"]


async def test_what_was_preloaded_is_not_the_next_to_go() -> None:
    engine = FakeEngine(max_loras=2)
    async with running_pool(engine) as pool:
        await use_once(pool, "old@1")
        assert await pool.preload(fake_artifact("new@1"))
        await use_once(pool, "other@1")
        assert engine.unloads == ["old@1"]


async def test_who_comes_to_a_closed_pool_is_told_at_once() -> None:
    async with running_pool(FakeEngine()) as pool:
        pool.close()
        with pytest.raises(errors.EngineDeadError):
            await use_once(pool, "a@1")
        assert list(pool.residents()) == []


async def test_after_an_engine_restart_adapters_load_again_under_fresh_ids() -> None:
    engine = FakeEngine()
    async with running_pool(engine) as pool:
        first = await use_once(pool, "a@1")
        engine.die()
        pool.forget_all()
        await engine.start()
        assert await use_once(pool, "a@1") > first


async def test_a_load_that_an_engine_restart_overtakes_holds_no_slot() -> None:
    engine, gate = FakeEngine(max_loras=1), OpenGate()
    checking = asyncio.Event()

    async def slow_check(artifact: Any, limits: Any) -> None:
        await checking.wait()

    async with running_pool(engine, gate, max_wait_seconds=0.5) as pool:
        gate.check = slow_check  # type: ignore[method-assign]
        overtaken = asyncio.create_task(use_once(pool, "a@1"))
        await asyncio.sleep(0.01)
        engine.die()
        pool.forget_all()
        await engine.start()
        checking.set()
        with pytest.raises(errors.EngineDeadError):
            await overtaken
        await use_once(pool, "b@1")
        assert [adapter.name for adapter in engine.loaded.values()] == ["b@1"]


async def test_an_engine_that_dies_while_adapters_leave_does_not_end_the_handing_out_of_slots() -> None:
    engine = FakeEngine(max_loras=2)
    async with running_pool(engine) as pool:
        await use_once(pool, "a@1")
        await use_once(pool, "b@1")
        unload = engine.unload_adapter

        async def die_instead(adapter: Any) -> None:
            engine.die()
            pool.forget_all()
            await engine.start()

        engine.unload_adapter = die_instead  # type: ignore[method-assign]
        pool.withdraw("a@1")
        pool.withdraw("b@1")
        await asyncio.sleep(0.05)
        engine.unload_adapter = unload  # type: ignore[method-assign]
        async with asyncio.timeout(1):
            await use_once(pool, "c@1")


async def test_concurrent_preloads_never_evict_or_drain_anybody() -> None:
    engine = FakeEngine(max_loras=2)
    async with running_pool(engine, turn_seconds=0.0) as pool:
        await use_once(pool, "hot@1")
        await asyncio.gather(*(pool.preload(fake_artifact(f"new{n}@1")) for n in range(4)))
        assert engine.unloads == []
        assert "hot@1" in {adapter.name for adapter in engine.loaded.values()}


async def test_a_refusal_that_is_raised_often_does_not_grow() -> None:
    engine, gate = FakeEngine(), OpenGate()
    gate.refuse.add("bad@1")
    async with running_pool(engine, gate) as pool:
        depths = []
        for _ in range(20):
            with pytest.raises(errors.InvalidArtifactError) as caught:
                await use_once(pool, "bad@1")
            depths.append(len(caught.traceback))
        assert max(depths[1:]) <= depths[1]


async def test_an_adapter_that_everybody_gave_up_on_is_not_loaded() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine, turn_seconds=60) as pool:
        let_go, holding = asyncio.Event(), asyncio.Event()
        user = asyncio.create_task(hold(pool, "a@1", let_go, holding))
        await holding.wait()
        leavers = [asyncio.create_task(use_once(pool, "b@1")) for _ in range(3)]
        stayer = asyncio.create_task(use_once(pool, "c@1"))
        await asyncio.sleep(0.01)
        for leaver in leavers[:-1]:
            leaver.cancel()
        await asyncio.sleep(0.01)
        assert pool.status("b@1").state is AdapterState.LOADING, "one still waits"
        leavers[-1].cancel()
        await asyncio.sleep(0.01)
        assert pool.status("b@1").state is AdapterState.AVAILABLE
        let_go.set()
        await asyncio.gather(user, stayer)
        assert engine.loads == ["a@1", "c@1"]


async def test_an_adapter_that_everybody_gave_up_on_during_its_check_takes_no_slot() -> None:
    engine, gate = FakeEngine(max_loras=1), OpenGate()
    checking = asyncio.Event()

    async def slow_check(artifact: Any, limits: Any) -> None:
        await checking.wait()

    async with running_pool(engine, gate) as pool:
        gate.check = slow_check  # type: ignore[method-assign]
        leaver = asyncio.create_task(use_once(pool, "a@1"))
        await asyncio.sleep(0.01)
        leaver.cancel()
        await asyncio.sleep(0.01)
        checking.set()
        await asyncio.sleep(0.01)
        assert engine.loads == []
        assert pool.status("a@1").state is AdapterState.AVAILABLE
        await use_once(pool, "a@1")


async def test_who_comes_back_after_giving_up_is_served() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine, max_wait_seconds=0.03, turn_seconds=60) as pool:
        let_go, holding = asyncio.Event(), asyncio.Event()
        user = asyncio.create_task(hold(pool, "a@1", let_go, holding))
        await holding.wait()
        for _ in range(3):
            with pytest.raises(errors.UnavailableError):
                await use_once(pool, "b@1")
        let_go.set()
        await user
        await use_once(pool, "b@1")
        assert engine.loads == ["a@1", "b@1"]


async def test_a_pinned_adapter_is_neither_evicted_nor_drained() -> None:
    engine = FakeEngine(max_loras=2)
    async with running_pool(engine, turn_seconds=0.0) as pool:
        await use_once(pool, "pinned@1")
        pool.pin({"pinned@1"})
        for number in range(5):
            await use_once(pool, f"a{number}@1")
        let_go, holding = asyncio.Event(), asyncio.Event()
        user = asyncio.create_task(hold(pool, "pinned@1", let_go, holding))
        await holding.wait()
        await asyncio.gather(*(use_once(pool, f"b{number}@1") for number in range(5)))
        assert "pinned@1" not in engine.unloads
        assert pool.status("pinned@1").is_pinned
        pool.pin(set())
        let_go.set()
        await user
        await use_once(pool, "c@1")
        await use_once(pool, "d@1")
        assert "pinned@1" in engine.unloads


async def test_what_was_pinned_comes_back_first_after_an_engine_restart() -> None:
    engine = FakeEngine(max_loras=3)
    async with running_pool(engine) as pool:
        for revision in ("pinned@1", "a@1", "b@1"):
            await use_once(pool, revision)
        pool.pin({"pinned@1"})
        assert [artifact.revision for artifact in pool.forget_all()] == ["pinned@1", "b@1", "a@1"]


async def test_warming_takes_turns_and_says_when_time_ran_out() -> None:
    engine = FakeEngine(max_loras=1)
    async with running_pool(engine, turn_seconds=60) as pool:
        assert await pool.warm([fake_artifact("a@1")], 5)
        let_go, holding = asyncio.Event(), asyncio.Event()
        user = asyncio.create_task(hold(pool, "a@1", let_go, holding))
        await holding.wait()
        assert not await pool.warm([fake_artifact("b@1")], 0.02)
        assert pool.status("b@1").state is AdapterState.AVAILABLE, "nobody waits for it any more"
        let_go.set()
        await user


async def test_vetting_checks_without_the_engine_and_remembers() -> None:
    engine, gate = FakeEngine(), OpenGate()
    gate.refuse.add("bad@1")
    async with running_pool(engine, gate) as pool:
        await pool.vet(fake_artifact("good@1"))
        for _ in range(2):
            with pytest.raises(errors.InvalidArtifactError):
                await pool.vet(fake_artifact("bad@1"))
        assert pool.status("bad@1").state is AdapterState.REFUSED
        assert engine.loads == []


async def test_a_revision_that_is_deleted_while_it_is_vetted_is_not_refused() -> None:
    gate = SlowGate("bad@1")
    gate.refuse.add("bad@1")
    async with running_pool(FakeEngine(), gate) as pool:
        vetting = asyncio.create_task(pool.vet(fake_artifact("bad@1")))
        await asyncio.sleep(0.01)
        pool.withdraw("bad@1")
        gate.forgotten.clear()
        gate.go_on.set()
        with pytest.raises(errors.ModelNotFoundError):
            await vetting
        assert pool.status("bad@1").state is AdapterState.AVAILABLE
        assert gate.forgotten == ["bad@1"]


async def test_what_the_engine_says_of_an_adapter_whose_files_have_gone_is_no_refusal() -> None:
    engine, gate = FakeEngine(), OpenGate()
    engine.refuse.add("a@1")
    gate.gone.add("a@1")
    async with running_pool(engine, gate) as pool:
        with pytest.raises(errors.ModelNotFoundError):
            await use_once(pool, "a@1")
        assert pool.status("a@1").state is AdapterState.AVAILABLE
        assert pool.num_free_slots == 2
