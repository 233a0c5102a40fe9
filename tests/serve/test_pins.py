"""Pins: what stays in the engine, through flips, restarts and everything that others want."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from registry import CanaryRequest, Registry
from tests.serve.admin import Admin, Refused, admin_of
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import BASE, eventually, publish
from tests.serve.test_pool import OpenGate

FACES = pytest.mark.parametrize("face", ["http", "grpc"])


def pinned(admin: Admin) -> set[str]:
    """Revisions that are pinned and loaded."""
    return {
        view.artifact.revision
        for view in admin.service.adapters()
        if view.status.is_pinned and view.status.state == "loaded"
    }


def states(admin: Admin) -> dict[str, str]:
    return {pin.reference: pin.state.value for pin in admin.service.pins.all()}


async def test_pinned_adapters_are_loaded_before_the_service_is_ready(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=3)
    one, two = publish(registry, "one", alias="first"), publish(registry, "two")
    async with admin_of("http", engine, tmp_path, pins=["first", two.revision]):
        assert {adapter.name for adapter in engine.loaded.values()} == {one.revision, two.revision}


async def test_a_pin_that_is_refused_or_missing_stops_nothing_and_is_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry, engine, gate = Registry(tmp_path), FakeEngine(max_loras=3), OpenGate()
    good, bad = publish(registry, "good", alias="good"), publish(registry, "bad")
    gate.refuse.add(bad.revision)
    pins = ["missing", bad.revision, "good"]
    async with admin_of("http", engine, tmp_path, gate=gate, pins=pins) as admin:
        assert [(pin["reference"], pin["state"]) for pin in await admin.pins()] == [
            ("missing", "missing"),
            (bad.revision, "refused"),
            ("good", "held"),
        ]
        assert (await admin.pins())[1]["reason"]["code"] == "not_finite"
        assert await admin.ask("good") == good.revision
        assert "pin of missing: missing" in caplog.text
        assert f"pin of {bad.revision}: refused" in caplog.text
        late = await asyncio.to_thread(publish, registry, "late", alias="missing")
        await eventually(lambda: late.revision in pinned(admin))
        assert states(admin)["missing"] == "held"


@FACES
async def test_a_pinned_adapter_stays_while_others_take_turns(tmp_path: Path, face: str) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=2)
    kept = publish(registry, "kept", alias="kept").revision
    others = [publish(registry, f"other{number}").revision for number in range(6)]
    async with admin_of(face, engine, tmp_path) as admin:
        assert await admin.pin("kept") | {"object": "pin"} == {
            "object": "pin",
            "reference": "kept",
            "state": "held",
            "reason": None,
            "revisions": [kept],
        }
        assert [await admin.ask(other) for other in others * 2] == others * 2
        assert kept not in engine.unloads
        listed = await admin.adapters()
        assert [revision for revision, adapter in listed.items() if adapter["pinned"]] == [kept]
        await admin.unpin("kept")
        assert await admin.pins() == []
        for other in others[:2]:
            await admin.ask(other)
        assert kept in engine.unloads


@FACES
async def test_the_last_slot_cannot_be_pinned(tmp_path: Path, face: str) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=2)
    one, two = (publish(registry, name, alias=name).revision for name in ("one", "two"))
    async with admin_of(face, engine, tmp_path) as admin:
        await admin.pin("one")
        assert (await admin.pin("one"))["state"] == "held", "again is fine"
        assert (await admin.pin(one))["state"] == "held", "another name for the same adapter takes no room"
        with pytest.raises(Refused) as caught:
            await admin.pin("two")
        assert (caught.value.status, caught.value.code) == (409, "too_many_pins")
        assert "at most 1" in caught.value.message
        assert two not in pinned(admin)
        await admin.unpin("one")
        await admin.unpin(one)
        assert (await admin.pin("two"))["state"] == "held"


async def test_pins_of_the_settings_beyond_the_room_are_served_like_others_and_say_so(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=2)
    one, two = (publish(registry, name, alias=name).revision for name in ("one", "two"))
    async with admin_of("http", engine, tmp_path, pins=["one", "two"]) as admin:
        assert states(admin) == {"one": "held", "two": "no_room"}
        assert await admin.ask("two") == two
        await admin.unpin("one")
        await eventually(lambda: states(admin)["two"] == "held")
        assert one not in pinned(admin)


@FACES
@pytest.mark.parametrize(
    ("reference", "status", "code"),
    [
        ("nothing", 404, "model_not_found"),
        ("kept@00000000", 404, "model_not_found"),
        (BASE, 400, "invalid_name"),
        ("../x", 400, "invalid_name"),
        ("bad", 400, "not_finite"),
        ("unloadable", 400, "engine_refused"),
    ],
)
async def test_what_cannot_be_pinned_is_refused_and_leaves_no_pin(
    tmp_path: Path, face: str, reference: str, status: int, code: str
) -> None:
    registry, engine, gate = Registry(tmp_path), FakeEngine(), OpenGate()
    publish(registry, "kept", alias="kept")
    gate.refuse.add(publish(registry, "bad", alias="bad").revision)
    engine.refuse.add(publish(registry, "unloadable", alias="unloadable").revision)
    async with admin_of(face, engine, tmp_path, gate=gate) as admin:
        with pytest.raises(Refused) as caught:
            await admin.pin(reference.replace("/", "%2F") if face == "http" else reference)
        assert (caught.value.status, caught.value.code) == (status, code)
        assert await admin.pins() == []
        with pytest.raises(Refused) as caught:
            await admin.unpin("kept")
        assert (caught.value.status, caught.value.code) == (404, "not_pinned")


async def test_a_pin_follows_its_alias(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=3)
    one, two, three = (publish(registry, "support", content).revision for content in ("one", "two", "three"))
    registry.set_alias("support", one)
    async with admin_of("http", engine, tmp_path, pins=["support"]) as admin:
        assert pinned(admin) == {one}
        await admin.set_alias("support", two)
        assert pinned(admin) == {two}, "a flip through the service is warm, and so pinned at once"
        await asyncio.to_thread(registry.set_alias, "support", three, canary=CanaryRequest(one, 10))
        await eventually(lambda: pinned(admin) == {three, one})
        await admin.roll_back("support")
        assert pinned(admin) == {three}
        await admin.remove_alias("support")
        assert pinned(admin) == set()
        assert states(admin) == {"support": "missing"}


async def test_a_pinned_adapter_that_leaves_the_registry_leaves_the_engine(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine()
    artifact = publish(registry, "support")
    async with admin_of("http", engine, tmp_path, pins=[artifact.revision]) as admin:
        await asyncio.to_thread(registry.remove, artifact.revision)
        await eventually(lambda: not engine.loaded)
        assert states(admin) == {artifact.revision: "missing"}


async def test_pinned_adapters_come_back_after_an_engine_restart(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=3)
    one, two = publish(registry, "one", alias="one"), publish(registry, "two", alias="two")
    async with admin_of("http", engine, tmp_path, pins=["one", "two"]) as admin:
        engine.die()
        await eventually(lambda: engine.starts == 2)
        await eventually(lambda: pinned(admin) == {one.revision, two.revision})
        assert len(engine.loaded) == 2


async def test_a_bug_while_pins_are_loaded_is_logged_and_they_are_loaded_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, engine = Registry(tmp_path), FakeEngine()
    async with admin_of("http", engine, tmp_path, pins=["late"]) as admin:
        with monkeypatch.context() as broken:
            broken.setattr(admin.service.pins, "load", lambda: [][1])
            await eventually(lambda: "list index out of range" in caplog.text, seconds=3)
        late = await asyncio.to_thread(publish, registry, "late", alias="late")
        await eventually(lambda: late.revision in pinned(admin))


async def test_pins_and_their_number_are_in_the_metrics(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=3)
    publish(registry, "one", alias="one")
    async with admin_of("http", engine, tmp_path, pins=["one"]) as admin:
        (family,) = admin.service.metrics._pinned.collect()
        assert [sample.value for sample in family.samples] == [1]
