"""The engine's death and standstill: noticed, survived, and not repeated."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from registry import Registry, errors
from registry.principal import Principal, Scope, acting_as
from serve.engine_api import Call, Endpoint
from serve.resident import AdapterState
from serve.service import Origin
from serve.supervisor import Quarantine
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import BASE, eventually, publish, running_service
from tests.serve.test_http import HELLO, ask


async def test_a_dead_engine_is_started_again_and_its_adapters_are_loaded_again(tmp_path: Path) -> None:
    engine, artifact = FakeEngine(), publish(Registry(tmp_path), "support")
    async with running_service(engine, tmp_path) as (client, service):
        await ask(client, artifact.revision)
        engine.die()
        assert (await client.get("/readyz")).status_code == 503
        await eventually(lambda: service.not_ready_reason() is None)
        await eventually(lambda: [a.name for a in engine.loaded.values()] == [artifact.revision])
        assert (await ask(client, artifact.revision)).status_code == 200
        assert service.metrics.engine_restarts._value.get() == 1


async def test_an_engine_that_does_not_start_is_tried_again(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running_service(engine, tmp_path) as (client, service):
        engine.failing_starts = 1
        engine.die()
        await eventually(lambda: service.not_ready_reason() is None, seconds=5)
        assert engine.starts == 3
        assert (await ask(client, BASE)).status_code == 200


async def test_an_engine_that_stands_still_with_work_in_it_is_ended_and_started_again(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running_service(engine, tmp_path, engine_stall_seconds=0.3) as (client, service):
        await asyncio.sleep(0.5)
        assert engine.kills == 0, "an idle engine does not stand still"
        engine.answer_gate.clear()
        stuck = asyncio.create_task(ask(client, BASE))
        await eventually(lambda: engine.kills == 1)
        engine.answer_gate.set()
        assert (await stuck).status_code == 503
        await eventually(lambda: service.not_ready_reason() is None)


async def test_an_engine_that_took_long_to_start_is_not_ended_for_its_first_work(tmp_path: Path) -> None:
    publish(Registry(tmp_path), "support", alias="help")  # loaded ahead, as soon as the engine is up
    engine = FakeEngine()
    engine.start_seconds, engine.load_seconds = 0.6, 0.3
    async with running_service(engine, tmp_path, engine_stall_seconds=0.5):
        await eventually(lambda: engine.loads != [])
    assert engine.kills == 0


async def test_an_engine_that_loads_many_adapters_one_after_the_other_does_not_stand_still(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=6)
    revisions = [publish(registry, f"a{number}").revision for number in range(6)]
    engine.load_seconds = 0.15
    async with running_service(engine, tmp_path, engine_stall_seconds=0.5) as (client, _):
        answers = await asyncio.gather(*(ask(client, revision) for revision in revisions))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert engine.kills == 0


async def test_an_engine_that_does_not_end_a_load_is_ended(tmp_path: Path) -> None:
    engine, revision = FakeEngine(), publish(Registry(tmp_path), "support").revision
    engine.load_gate.clear()
    async with running_service(engine, tmp_path, engine_stall_seconds=0.3) as (client, _):
        stuck = asyncio.create_task(ask(client, revision))
        await eventually(lambda: engine.kills == 1)
        engine.load_gate.set()
        assert (await stuck).status_code == 503


async def test_a_bug_while_the_engine_is_looked_after_is_logged_and_it_is_looked_after_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    async with running_service(engine, tmp_path) as (_, service):
        with monkeypatch.context() as broken:
            broken.setattr(service.supervisor, "_stands_still", lambda: [][1])
            await eventually(lambda: "list index out of range" in caplog.text)
        engine.die()
        await eventually(lambda: engine.starts == 2 and service.not_ready_reason() is None)


async def test_a_request_that_kills_the_engine_twice_is_quarantined_and_others_are_not(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running_service(engine, tmp_path) as (client, service):

        async def kill_with(text: str) -> httpx.Response:
            engine.fail_after_tokens = 1
            body = {"model": BASE, "messages": [{"role": "user", "content": text}]}
            answer = await client.post("/v1/chat/completions", json=body)
            engine.fail_after_tokens = None
            await eventually(lambda: service.not_ready_reason() is None, seconds=5)
            return answer

        assert (await kill_with("poison")).status_code == 503
        assert (await kill_with("poison")).status_code == 503
        starts = engine.starts
        third = await kill_with("poison")
        assert (third.status_code, third.json()["error"]["code"]) == (400, "quarantined")
        assert engine.starts == starts
        other = await client.post("/v1/chat/completions", json={"model": BASE, "messages": HELLO})
        assert other.status_code == 200


async def test_a_key_does_not_hide_a_request_that_kills_the_engine_from_the_quarantine(tmp_path: Path) -> None:
    engine = FakeEngine()
    body = {"model": BASE, "messages": [{"role": "user", "content": "poison"}]}
    async with running_service(engine, tmp_path) as (_, service):
        with acting_as(Principal("acme", "key_1", frozenset({Scope.INFER}))):
            for _ in range(2):
                engine.fail_after_tokens = 1
                with pytest.raises(errors.EngineDeadError):
                    await service.complete(Endpoint.CHAT, body, Origin("http", "r"))
                engine.fail_after_tokens = None
                await eventually(lambda: service.not_ready_reason() is None, seconds=5)
            with pytest.raises(errors.InvalidRequestError) as refusal:
                await service.complete(Endpoint.CHAT, body, Origin("http", "r"))
    assert refusal.value.code == "quarantined"
    assert engine.starts == 3


async def test_a_request_that_only_waited_for_a_slot_at_two_deaths_is_answered_afterwards(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=1)
    hot, cold = (publish(registry, name).revision for name in ("hot", "cold"))
    async with running_service(engine, tmp_path) as (client, service):
        for number in range(2):
            engine.answer_gate.clear()
            prompt = [{"role": "user", "content": f"another one: {number}"}]
            holding = asyncio.create_task(client.post("/v1/chat/completions", json={"model": hot, "messages": prompt}))
            await eventually(lambda: engine.waiting == 1)
            waiting = asyncio.create_task(ask(client, cold))
            await eventually(lambda: service.pool.status(cold).state is AdapterState.LOADING)
            engine.die()
            engine.answer_gate.set()
            assert [(await task).status_code for task in (holding, waiting)] == [503, 503]
            await eventually(lambda: service.not_ready_reason() is None)
        assert cold not in engine.loads
        assert (await ask(client, cold)).status_code == 200


def test_who_was_blamed_too_long_ago_costs_nothing_any_more() -> None:
    quarantine = Quarantine(seconds=0.05)
    body = {"model": BASE, "prompt": "poison"}
    for death in range(2):
        quarantine.blame(Call(Endpoint.COMPLETION, body, None, BASE, "r"), death)
    with pytest.raises(errors.InvalidRequestError):
        quarantine.check(body)
    time.sleep(0.06)
    quarantine.check({"model": BASE, "prompt": "good"})
    assert quarantine._suspects == {}, "else every body is hashed for the rest of the process's life"
    quarantine.check(body)


async def test_a_client_that_does_not_read_is_no_standstill_of_the_engine(tmp_path: Path) -> None:
    engine = FakeEngine(num_tokens=3)
    async with running_service(engine, tmp_path, engine_stall_seconds=0.2) as (_, service):
        stream = service.stream(Endpoint.COMPLETION, {"model": BASE, "stream": True}, Origin("http", "r"))
        await anext(stream)
        await asyncio.sleep(0.6)
        assert engine.kills == 0
        await stream.aclose()
