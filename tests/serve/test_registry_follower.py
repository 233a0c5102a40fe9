"""What others do to the registry of a running service: loaded before it is asked for, or said to be refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from registry import CanaryRequest, Registry, errors
from tests.serve.admin import Refused, admin_of
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import NoGate, eventually, publish, running_service
from tests.serve.test_http import ask


class RefusingGate(NoGate):
    """Refuses the revisions in ``refuse``, and remembers what it looked at."""

    def __init__(self) -> None:
        self.refuse: set[str] = set()
        self.seen: list[str] = []

    async def check(self, artifact: Any, limits: Any) -> None:
        self.seen.append(artifact.revision)
        if artifact.revision in self.refuse:
            raise errors.InvalidArtifactError("no", code="not_finite")


async def test_what_an_alias_is_flipped_to_on_disk_is_loaded_before_it_is_asked_for(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine(max_loras=3)
    one, two, three = (publish(registry, "support", content).revision for content in ("one", "two", "three"))
    async with running_service(engine, tmp_path):
        assert engine.loads == []
        registry.set_alias("support", one)
        await eventually(lambda: engine.loads == [one])
        registry.set_alias("support", two, canary=CanaryRequest(three, 10))
        await eventually(lambda: engine.loads == [one, two, three])


async def test_what_aliases_serve_at_the_start_is_loaded_the_newest_first_as_slots_are_free(tmp_path: Path) -> None:
    now = 1_000_000.0
    registry, engine = Registry(tmp_path, clock=lambda: now), FakeEngine(max_loras=2)
    revisions = []
    for number in range(4):
        now += 10
        revisions.append(publish(registry, f"model{number}", alias=f"alias{number}").revision)
    publish(registry, "unnamed")
    now += 10
    publish(registry, "job", fine_tuned_name="ft:capo-tiny:capo:support:abcd1234")
    async with running_service(engine, tmp_path) as (client, _):
        await eventually(lambda: len(engine.loads) == 2)
        assert (await ask(client, "alias3")).status_code == 200
        assert engine.loads == [revisions[3], revisions[2]]


async def test_where_no_slot_is_free_the_gate_looks_at_an_aliass_target_all_the_same(tmp_path: Path) -> None:
    registry, engine, gate = Registry(tmp_path), FakeEngine(max_loras=1), RefusingGate()
    one, bad, unnamed = (publish(registry, "support", content).revision for content in ("one", "bad", "unnamed"))
    gate.refuse.add(bad)
    async with admin_of("http", engine, tmp_path, gate=gate) as admin:
        assert await admin.ask(one) == one
        registry.set_alias("support", bad)
        await eventually(lambda: bad in gate.seen)
        listed = await admin.adapters()
        assert (listed[bad]["state"], listed[bad]["reason"]["code"]) == ("refused", "not_finite")
        assert (listed[one]["state"], listed[unnamed]["state"]) == ("loaded", "available")
        assert engine.unloads == []


async def test_a_load_ahead_that_fails_does_not_end_those_that_follow(tmp_path: Path) -> None:
    registry, engine, gate = Registry(tmp_path), FakeEngine(max_loras=2), RefusingGate()
    async with running_service(engine, tmp_path, gate=gate) as _:

        async def fail(artifact: Any, limits: Any) -> None:
            raise RuntimeError("our bug")

        with patch.object(gate, "check", fail):
            publish(registry, "first")
            await asyncio.sleep(0.2)
        second = publish(registry, "second").revision
        await eventually(lambda: engine.loads == [second])


@pytest.mark.parametrize("face", ["http", "grpc"])
async def test_a_damaged_directory_is_listed_among_the_refused_and_counted_once(tmp_path: Path, face: str) -> None:
    registry = Registry(tmp_path)
    artifact, whole = publish(registry, "support", alias="help"), publish(registry, "other")
    async with admin_of(face, FakeEngine(), tmp_path) as admin:
        (artifact.path / "manifest.json").write_bytes(b"{}")
        (tmp_path / "artifacts" / "support" / ("0" * 64)).mkdir()
        for number in range(2):
            revision = publish(registry, "later", str(number)).revision  # what makes the service look
            await eventually(lambda: revision in admin.service.catalog.snapshot.artifacts)  # noqa: B023
        listed = await admin.adapters()
        for revision, code in ((artifact.revision, "digest_mismatch"), ("support@" + "0" * 16, "no_manifest")):
            assert (listed[revision]["state"], listed[revision]["reason"]["code"]) == ("refused", code)
            assert admin.service.metrics._refusals.labels(code)._value.get() == 1
        assert listed[whole.revision]["state"] == "available"
        with pytest.raises(Refused) as unknown:
            await admin.ask("help")
        assert unknown.value.status == 404


@pytest.mark.parametrize("face", ["http", "grpc"])
@pytest.mark.parametrize("place", ["created_at", "lora.rank"])
async def test_a_number_in_a_manifest_that_no_wire_carries_is_a_damaged_artifact_beside_the_whole_ones(
    tmp_path: Path, face: str, place: str
) -> None:
    registry = Registry(tmp_path)
    whole = publish(registry, "whole", alias="help")
    manifest = json.loads(whole.manifest.to_bytes())
    outer, _, inner = place.rpartition(".")
    (manifest[outer] if outer else manifest)[inner] = 2**64
    content = json.dumps(manifest).encode()
    digest = hashlib.sha256(content).hexdigest()
    shutil.copytree(whole.path, whole.path.with_name(digest))
    (whole.path.with_name(digest) / "manifest.json").write_bytes(content)
    async with admin_of(face, FakeEngine(), tmp_path) as admin:
        listed = await admin.adapters()
        damaged = listed[f"whole@{digest[:16]}"]
        assert (damaged["state"], damaged["reason"]["code"]) == ("refused", "invalid_manifest")
        assert listed[whole.revision]["state"] in ("available", "loading", "loaded")
        assert await admin.ask("help") == whole.revision
