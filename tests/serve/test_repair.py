"""Damage that was repaired is over at once, and damage that was not is not looked for again with every request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from registry import Artifact, BaseModel, Registry, errors
from serve import gate as gate_module
from serve.gate import Gate
from tests.registry.samples import write_adapter
from tests.serve.admin import Refused, admin_of
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_gate import LIMITS


@pytest.fixture
def readings(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read whole, one entry for each time."""
    done: list[str] = []
    verify = registry.verify

    def noted(reference: str) -> list[str]:
        done.append(reference)
        return verify(reference)

    monkeypatch.setattr(registry, "verify", noted)
    return done


def weights_of(artifact: Artifact) -> Path:
    return artifact.path / "adapter_model.safetensors"


def damage(artifact: Artifact) -> bytes:
    """Turn one bit over; returns the bytes as they were."""
    weights = weights_of(artifact)
    whole = weights.read_bytes()
    weights.chmod(0o600)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return whole


def publish_again(registry: Registry, artifact: Artifact, base: BaseModel, adapter: Path, whole: bytes) -> None:
    assert registry.import_adapter(adapter, name="support", base_model=base).revision == artifact.revision


def restore_in_place(registry: Registry, artifact: Artifact, base: BaseModel, adapter: Path, whole: bytes) -> None:
    weights_of(artifact).write_bytes(whole)


@pytest.mark.parametrize("repair", [publish_again, restore_in_place])
@pytest.mark.parametrize("face", ["http", "grpc"])
async def test_a_repaired_adapter_answers_at_once_and_aliases_and_pins_take_it(
    registry: Registry, base: BaseModel, tmp_path: Path, repair: Callable[..., None], face: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    artifact = registry.import_adapter(adapter, name="support", base_model=base)
    whole = damage(artifact)
    async with admin_of(face, FakeEngine(), registry.root, gate=Gate(registry, base)) as admin:
        for ask in (lambda: admin.ask(artifact.revision), lambda: admin.set_alias("help", artifact.revision)):
            with pytest.raises(Refused) as refused:
                await ask()
            assert refused.value.code == "damaged"
        assert (await admin.adapters())[artifact.revision]["state"] == "refused"
        repair(registry, artifact, base, adapter, whole)
        assert await admin.ask(artifact.revision) == artifact.revision
        assert (await admin.adapters())[artifact.revision]["state"] == "loaded"
        await admin.set_alias("help", artifact.revision)
        assert (await admin.pin("help"))["state"] == "held"


async def test_an_adapter_that_is_vetted_after_its_repair_is_refused_no_more(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    artifact = registry.import_adapter(write_adapter(tmp_path / "adapter"), name="support", base_model=base)
    whole = damage(artifact)
    async with admin_of("http", FakeEngine(), registry.root, gate=Gate(registry, base)) as admin:
        pool = admin.service.pool
        with pytest.raises(errors.InvalidArtifactError):
            await pool.vet(artifact)
        weights_of(artifact).write_bytes(whole)
        await pool.vet(artifact)
        assert pool.status(artifact.revision).reason is None


async def test_what_is_still_damaged_is_refused_again_without_being_read_again_and_stays_listed(
    registry: Registry, base: BaseModel, tmp_path: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.refusals._ENGINE_VERDICT_SECONDS", 0.0)  # those of the engine end of themselves
    artifact = registry.import_adapter(write_adapter(tmp_path / "adapter"), name="support", base_model=base)
    weights_of(artifact).unlink()
    async with admin_of("http", FakeEngine(), registry.root, gate=Gate(registry, base)) as admin:
        for _ in range(5):
            with pytest.raises(Refused) as refused:
                await admin.ask(artifact.revision)
            assert (refused.value.status, refused.value.code) == (400, "damaged")
            assert (await admin.adapters())[artifact.revision]["state"] == "refused"
        assert admin.service.metrics._refusals.labels("damaged")._value.get() == 1
    assert len(readings) == 1


async def test_a_repair_that_the_files_do_not_show_is_seen_after_a_while(
    registry: Registry, base: BaseModel, tmp_path: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = registry.import_adapter(write_adapter(tmp_path / "adapter"), name="support", base_model=base)
    gate, unlisted = Gate(registry, base), artifact.path / "notes.txt"
    unlisted.touch()
    with pytest.raises(errors.InvalidArtifactError):
        await gate.check(artifact, LIMITS)
    unlisted.unlink()
    with pytest.raises(errors.InvalidArtifactError, match="not in the manifest"):
        await gate.check(artifact, LIMITS)
    assert len(readings) == 1
    monkeypatch.setattr(gate_module, "_DAMAGE_SECONDS", 0.0)
    await gate.check(artifact, LIMITS)
    assert len(readings) == 2


async def test_a_damaged_adapter_that_is_deleted_is_unknown_and_no_longer_damaged(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    artifact = registry.import_adapter(write_adapter(tmp_path / "adapter"), name="support", base_model=base)
    gate = Gate(registry, base)
    for path in artifact.path.iterdir():
        path.unlink()
    with pytest.raises(errors.InvalidArtifactError):
        await gate.check(artifact, LIMITS)
    artifact.path.rmdir()
    with pytest.raises(errors.ModelNotFoundError):
        await gate.check(artifact, LIMITS)
