"""Aliases through a running service, over HTTP and gRPC alike: vetted, warm, split, rolled back."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from registry import CanaryRequest, Registry
from registry.durable import Filesystem
from registry.layout import Layout
from tests.serve.admin import Refused, admin_of
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import BASE, eventually, publish, running_service
from tests.serve.test_pool import OpenGate

FACES = pytest.mark.parametrize("face", ["http", "grpc"])


async def refusal_of(call: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        await call
    return caught.value


@FACES
async def test_a_canary_takes_its_share_and_answers_name_the_revision_that_spoke(tmp_path: Path, face: str) -> None:
    registry = Registry(tmp_path)
    main, new = (publish(registry, "support", content).revision for content in ("one", "two"))
    async with admin_of(face, FakeEngine(), tmp_path) as admin:
        flipped = await admin.set_alias("support", main, canary=(new, 30))
        assert flipped["canary"] == {"revision": new, "percent": 30}
        answers = [await admin.ask("support") for _ in range(300)]
        assert set(answers) == {main, new}
        assert 40 < answers.count(new) < 140, "90 are expected; this is six standard deviations"
        assert (await admin.adapters())[new]["canary_of"] == ["support"]
        assert (await admin.adapters())[main]["aliases"] == ["support"]


async def test_an_end_user_stays_on_one_revision_on_every_replica(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    main, new = (publish(registry, "support", content).revision for content in ("one", "two"))
    registry.set_alias("support", main, canary=CanaryRequest(new, 50))
    users = [f"user-{number}" for number in range(20)]
    seen: list[dict[str, str]] = []
    for _ in range(2):
        async with admin_of("http", FakeEngine(), tmp_path) as admin:
            for _ in range(3):
                seen.append({user: await admin.ask("support", user) for user in users})
    assert all(answers == seen[0] for answers in seen)
    assert set(seen[0].values()) == {main, new}


@FACES
async def test_an_alias_is_looked_at_rolled_back_and_removed(tmp_path: Path, face: str) -> None:
    registry = Registry(tmp_path)
    one, two, three = (publish(registry, "support", content).revision for content in ("one", "two", "three"))
    async with admin_of(face, FakeEngine(), tmp_path) as admin:
        await admin.set_alias("support", one)
        await admin.set_alias("support", two, canary=(three, 10))
        looked = await admin.alias("support")
        assert (looked["revision"], looked["canary"]) == (two, {"revision": three, "percent": 10})
        assert [entry["revision"] for entry in looked["history"]] == [one]
        assert [alias["alias"] for alias in await admin.aliases()] == ["support"]

        ended = await admin.roll_back("support")
        assert (ended["revision"], ended["canary"]) == (two, None), "the canary is what was new"
        assert (await admin.roll_back("support"))["revision"] == one
        assert await admin.ask("support") == one
        assert (await refusal_of(admin.roll_back("support"))).status == 409

        await admin.remove_alias("support")
        assert (await refusal_of(admin.ask("support"))).status == 404
        assert (await refusal_of(admin.alias("support"))).status == 404
        assert (await refusal_of(admin.remove_alias("support"))).status == 404
        assert await admin.ask(two) == two


async def test_the_disk_is_read_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, engine = Registry(tmp_path), FakeEngine()
    one, two = (publish(registry, "support", content).revision for content in ("one", "two"))
    async with admin_of("http", engine, tmp_path) as admin:
        opened: set[threading.Thread] = set()
        really_open = os.open

        def noted_open(*arguments: Any, **options: Any) -> int:
            opened.add(threading.current_thread())
            return really_open(*arguments, **options)

        monkeypatch.setattr(os, "open", noted_open)
        await admin.set_alias("support", one)
        await admin.set_alias("support", two)
        await admin.alias("support")
        await admin.roll_back("support")
        await admin.remove_alias("support")
    assert opened
    assert threading.current_thread() not in opened


@FACES
async def test_a_name_with_a_slash_is_a_name(tmp_path: Path, face: str) -> None:
    ft = "ft:Qwen/Qwen3-0.6B:capo:support:abcd1234"
    artifact = publish(Registry(tmp_path), "support", fine_tuned_name=ft)
    async with admin_of(face, FakeEngine(), tmp_path) as admin:
        assert (await admin.alias(ft))["revision"] == artifact.revision
        assert (await admin.pin(ft))["reference"] == ft
        await admin.unpin(ft)
        await admin.remove_alias(ft)


@FACES
@pytest.mark.parametrize("stage", ["gate", "engine"])
@pytest.mark.parametrize("role", ["main", "canary"])
async def test_an_adapter_that_is_refused_never_takes_an_aliass_traffic(
    tmp_path: Path, face: str, stage: str, role: str
) -> None:
    registry, engine, gate = Registry(tmp_path), FakeEngine(), OpenGate()
    good, bad = (publish(registry, "support", content).revision for content in ("good", "bad"))
    (gate.refuse if stage == "gate" else engine.refuse).add(bad)
    code = "not_finite" if stage == "gate" else "engine_refused"
    async with admin_of(face, engine, tmp_path, gate=gate) as admin:
        await admin.set_alias("support", good)
        before = await admin.alias("support")
        flip = admin.set_alias("support", bad) if role == "main" else admin.set_alias("support", good, canary=(bad, 50))
        refused = await refusal_of(flip)
        assert (refused.status, refused.code) == (400, code)
        assert await admin.alias("support") == before
        assert {await admin.ask("support") for _ in range(20)} == {good}


@FACES
async def test_a_flip_waits_until_its_adapter_is_in_the_engine(tmp_path: Path, face: str) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=2)
    one, two = (publish(registry, "support", content).revision for content in ("one", "two"))
    async with admin_of(face, engine, tmp_path) as admin:
        assert (await admin.set_alias("support", one))["warmed"] is True
        engine.load_gate.clear()
        flip = asyncio.create_task(admin.set_alias("support", two))
        await asyncio.sleep(0.1)
        assert not flip.done()
        assert await admin.ask("support") == one, "requests go on as before"
        assert registry.alias("support").revision == one, "nobody else sees it either"
        engine.load_gate.set()
        assert (await flip)["warmed"] is True
        assert (await admin.adapters())[two]["state"] == "loaded"
        assert await admin.ask("support") == two


@FACES
async def test_a_flip_that_finds_no_slot_in_time_is_made_and_says_that_it_is_cold(tmp_path: Path, face: str) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=1, num_tokens=1000)
    one, two = (publish(registry, "support", content).revision for content in ("one", "two"))
    async with admin_of(face, engine, tmp_path, alias_warm_seconds=0.1) as admin:
        await admin.set_alias("support", one)
        engine.answer_gate.clear()
        busy = asyncio.create_task(admin.ask(one))
        await eventually(lambda: engine.waiting == 1)
        assert (await admin.set_alias("support", two))["warmed"] is False
        assert (await admin.alias("support"))["revision"] == two
        engine.answer_gate.set()
        assert await busy == one
        assert await admin.ask("support") == two


async def test_a_check_that_takes_longer_than_a_flip_waits_still_decides(tmp_path: Path) -> None:
    registry, gate = Registry(tmp_path), OpenGate()
    good, bad = (publish(registry, "support", content).revision for content in ("good", "bad"))
    gate.refuse.add(bad)
    check = gate.check

    async def slow_check(artifact: Any, limits: Any) -> None:
        await asyncio.sleep(0.2)
        await check(artifact, limits)

    async with admin_of("http", FakeEngine(), tmp_path, gate=gate, alias_warm_seconds=0.05) as admin:
        await admin.set_alias("support", good)
        gate.check = slow_check  # type: ignore[method-assign]
        assert (await refusal_of(admin.set_alias("support", bad))).code == "not_finite"
        assert (await admin.alias("support"))["revision"] == good


@FACES
async def test_an_adapter_that_kills_the_engine_while_it_loads_never_takes_an_aliass_traffic(
    tmp_path: Path, face: str
) -> None:
    registry, engine = Registry(tmp_path), FakeEngine()
    good, killer = (publish(registry, "support", content).revision for content in ("good", "killer"))
    load = engine.load_adapter

    async def die_of(adapter: Any) -> None:
        if adapter.name == killer:
            engine.die()
        await load(adapter)

    async with admin_of(face, engine, tmp_path) as admin:
        await admin.set_alias("support", good)
        engine.load_adapter = die_of  # type: ignore[method-assign]
        refused = await refusal_of(admin.set_alias("support", killer))
        assert (refused.status, refused.code) == (503, "engine_dead")
        assert registry.alias("support").revision == good
        await eventually(lambda: admin.service.not_ready_reason() is None)
        assert await admin.ask("support") == good


async def test_rolling_back_needs_no_engine(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine()
    one, two = (publish(registry, "support", content).revision for content in ("one", "two"))
    async with admin_of("http", engine, tmp_path) as admin:
        await admin.set_alias("support", one)
        await admin.set_alias("support", two)
        engine.failing_starts = 100
        engine.die()
        await eventually(lambda: admin.service.not_ready_reason() is not None)
        assert (await refusal_of(admin.set_alias("support", one))).code == "engine_dead"
        assert (await admin.roll_back("support"))["revision"] == one
        engine.failing_starts = 0


@FACES
@pytest.mark.parametrize(
    ("alias", "fields", "status", "code"),
    [
        (BASE, {}, 400, "reserved_name"),
        ("text", {}, 400, "reserved_name"),
        ("Support", {}, 400, "invalid_name"),
        ("", {}, 400, "invalid_name"),
        ("support", {"expected": "support@0000000000000000"}, 409, "alias_changed"),
        ("support", {"expected": "support"}, 400, "invalid_name"),
        ("support", {"canary": ("support@0000000000000000", 10)}, 404, "model_not_found"),
        ("support", {"canary": ("support@0000000000000000", 0)}, 400, "invalid_request"),
        ("support", {"canary": ("support@0000000000000000", 100)}, 400, "invalid_request"),
        ("support", {"canary": ("nothing", 10)}, 400, "invalid_name"),
        ("ft:capo-tiny:capo::a1", {"canary": ("OTHER", 10)}, 400, "alias_is_write_once"),
        ("support", {"canary": ("SAME", 10)}, 400, "invalid_request"),
    ],
)
async def test_a_wrong_alias_is_refused_before_anything_is_loaded(
    tmp_path: Path, face: str, alias: str, fields: dict[str, Any], status: int, code: str
) -> None:
    registry, engine = Registry(tmp_path), FakeEngine()
    one, two = (publish(registry, "support", content).revision for content in ("one", "two"))
    if "canary" in fields:
        revision, percent = fields["canary"]
        fields = {"canary": ({"SAME": one, "OTHER": two}.get(revision, revision), percent)}
    async with admin_of(face, engine, tmp_path) as admin:
        refused = await refusal_of(admin.set_alias(alias, one, **fields))
        assert (refused.status, refused.code) == (status, code)
        assert engine.loads == []
        assert await admin.aliases() == []


@FACES
async def test_compare_and_set_lets_one_of_two_operators_win(tmp_path: Path, face: str) -> None:
    registry = Registry(tmp_path)
    one, two, three = (publish(registry, "support", content).revision for content in ("one", "two", "three"))
    async with admin_of(face, FakeEngine(max_loras=3), tmp_path) as admin:
        await admin.set_alias("support", one)
        outcomes = await asyncio.gather(
            *(admin.set_alias("support", revision, expected=one) for revision in (two, three)), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
        assert [(refusal.status, refusal.code) for refusal in refused] == [(409, "alias_changed")]


async def test_flips_and_canaries_made_on_disk_by_others_are_followed(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    one, two = (publish(registry, "support", content, alias="support").revision for content in ("one", "two"))
    async with admin_of("http", FakeEngine(), tmp_path) as admin:
        assert await admin.ask("support") == two
        await asyncio.to_thread(registry.set_alias, "support", one, canary=CanaryRequest(two, 99))
        await eventually(lambda: admin.service.catalog.snapshot.aliases["support"].canary is not None)
        assert two in {await admin.ask("support") for _ in range(20)}
        await asyncio.to_thread(registry.rollback_alias, "support")
        await eventually(lambda: admin.service.catalog.snapshot.aliases["support"].canary is None)
        assert {await admin.ask("support") for _ in range(20)} == {one}


async def test_a_hundred_flips_under_traffic_fail_no_request_and_mix_no_answer(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    one, two, three = (publish(registry, "support", content).revision for content in ("one", "two", "three"))
    async with admin_of("http", FakeEngine(max_loras=2), tmp_path) as admin:
        await admin.set_alias("support", one)
        stop = asyncio.Event()
        answers: list[str] = []

        async def client(number: int) -> None:
            while not stop.is_set():
                answers.append(await admin.ask("support", f"user-{number}"))

        clients = [asyncio.create_task(client(number)) for number in range(8)]
        for number in range(100):
            main, canary = [(one, two), (two, three), (three, one)][number % 3]
            await admin.set_alias("support", main, canary=(canary, 50))
            if number % 5 == 0:
                await admin.roll_back("support")
        stop.set()
        await asyncio.gather(*clients)
        assert set(answers) == {one, two, three}


async def test_requests_to_a_canary_are_counted_by_arm_while_it_runs(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    one, two = (publish(registry, "support", content).revision for content in ("one", "two"))
    async with admin_of("http", FakeEngine(), tmp_path) as admin:
        await admin.set_alias("support", one, canary=(two, 50))
        answers = [await admin.ask("support") for _ in range(40)]

        def counts() -> dict[str, float]:
            (family,) = admin.service.metrics._canary_requests.collect()
            return {s.labels["arm"]: s.value for s in family.samples if s.name.endswith("_total")}

        assert counts() == {"main": answers.count(one), "canary": answers.count(two)}
        await admin.roll_back("support")
        assert counts() == {}
        await admin.ask("support")
        assert counts() == {}


@pytest.mark.parametrize(
    ("method", "path", "content", "param"),
    [
        ("PUT", "/v1/aliases/support", b"", None),
        ("PUT", "/v1/aliases/support", b"[]", None),
        ("PUT", "/v1/aliases/support", b'{"revision": "x@12345678", "force": true}', "force"),
        ("PUT", "/v1/aliases/support", b'{"revision": "x@12345678", "canary": {"revision": "x@1"}}', "canary.percent"),
        ("PUT", "/v1/aliases/support", b'{"revision": "x@1", "canary": {"revision": "x@1", "percent": "5"}}', "canary"),
        ("PUT", "/v1/aliases/support", b'{"revision": "x@1", "canary": {"revision": "x@1", "percent": 1.5}}', "canary"),
        (
            "PUT",
            "/v1/aliases/support",
            b'{"revision": "x@1", "canary": {"revision": "x@1", "percent": true}}',
            "canary",
        ),
        ("PUT", "/v1/aliases/support", b'{"revision": "x@1", "canary": 10}', "canary"),
        ("PUT", "/v1/aliases/support", b'{"revision": ["x@1"]}', "revision"),
        ("POST", "/v1/aliases/support/rollback", b'{"to": "x@12345678"}', "to"),
        ("PUT", "/v1/adapters/support/pin", b'{"for_seconds": 5}', "for_seconds"),
    ],
)
async def test_a_body_that_says_anything_unknown_is_refused(
    tmp_path: Path, method: str, path: str, content: bytes, param: str | None
) -> None:
    publish(Registry(tmp_path), "support", alias="support")
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        response = await client.request(method, path, content=content)
        assert response.status_code == 400, response.text
        got = response.json()["error"]["param"]
        assert got == param or (param is not None and got is not None and got.startswith(f"{param}."))


@FACES
async def test_a_slow_flip_does_not_undo_the_rollback_that_came_meanwhile(tmp_path: Path, face: str) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=3)
    one, two, three = (publish(registry, "support", content).revision for content in ("one", "two", "three"))
    async with admin_of(face, engine, tmp_path) as admin:
        await admin.set_alias("support", one)
        await admin.set_alias("support", two)
        engine.load_gate.clear()
        slow = asyncio.create_task(admin.set_alias("support", three))
        await eventually(lambda: engine.loading > 0)
        assert (await admin.roll_back("support"))["revision"] == one
        engine.load_gate.set()
        late = await refusal_of(slow)
        assert (late.status, late.code) == (409, "alias_changed")
        assert (await admin.alias("support"))["revision"] == one


async def test_changes_that_wait_for_the_registry_hold_up_no_first_load_and_no_unknown_name(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=1)
    first, second = (publish(registry, name, alias=name) for name in ("first", "second"))
    async with running_service(engine, tmp_path) as (client, _):

        async def status_of(model: str) -> int:
            body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
            return (await client.post("/v1/chat/completions", json=body, timeout=5)).status_code

        held = Filesystem().lock(Layout(tmp_path).lock, wait_seconds=5)
        assert held is not None
        waiting = [asyncio.create_task(client.delete(f"/v1/aliases/{name}")) for name in ("first", "second") * 10]
        await asyncio.sleep(0.2)
        assert [await status_of(name) for name in (first.revision, second.revision, "nobodys")] == [200, 200, 404]
        held.release()
        assert sorted(answer.status_code for answer in await asyncio.gather(*waiting))[:3] == [200, 200, 404]
