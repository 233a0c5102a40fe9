"""The gate: what may reach the engine, and what may reach traffic."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry import (
    Artifact,
    BaseModel,
    BaseModelIdentity,
    LoraShape,
    ManifestDraft,
    Probe,
    Registry,
    errors,
    locate_base_model,
)
from serve.engine_api import EngineAdapter, EngineLimits
from serve.gate import Gate
from tests.registry.samples import Tensors, adapter_tensors, write_adapter, write_base
from tests.serve.admin import admin_of
from tests.serve.fake_engine import FakeEngine

LIMITS = EngineLimits(max_loras=2, max_lora_rank=16, max_model_len=128, vocab_size=64)


def publish_unchecked(registry: Registry, folder: Path, base: BaseModel, **fields: Any) -> Artifact:
    """As a publisher would that checks nothing, so that the gate is alone with the adapter."""
    draft: dict[str, Any] = {
        "kind": "lora",
        "name": "support",
        "base_model": base.identity,
        "lora": LoraShape(rank=4, alpha=8, target_modules=["q_proj", "v_proj"]),
        "dtype": "float32",
    }
    return registry.publish(folder, ManifestDraft(**(draft | fields)))


async def code_of_refusal(registry: Registry, base: BaseModel, artifact: Artifact) -> str:
    with pytest.raises(errors.InvalidArtifactError) as caught:
        await Gate(registry, base).check(artifact, LIMITS)
    assert caught.value.message
    return caught.value.code


async def test_a_sound_adapter_passes(registry: Registry, base: BaseModel, tmp_path: Path) -> None:
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a"), base)
    await Gate(registry, base).check(artifact, LIMITS)


async def test_what_could_not_be_checked_is_noted_until_the_artifact_is_gone(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    gate = Gate(registry, base)
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a", target_modules=r".*\.(q|v)_proj"), base)
    assert gate.notes(artifact.revision) == ()
    for _ in range(2):
        await gate.check(artifact, LIMITS)
        (note,) = gate.notes(artifact.revision)
        assert "regular expression" in note
    gate.forget(artifact.revision)
    assert gate.notes(artifact.revision) == ()


@pytest.mark.parametrize("face", ["http", "grpc"])
async def test_the_list_of_adapters_says_what_could_not_be_checked(
    registry: Registry, base: BaseModel, tmp_path: Path, face: str
) -> None:
    folder = write_adapter(tmp_path / "a", target_modules=r".*\.(q|v)_proj")
    revision = registry.import_adapter(folder, name="support", base_model=base).revision
    async with admin_of(face, FakeEngine(), registry.root, gate=Gate(registry, base)) as admin:
        assert (await admin.adapters())[revision]["notes"] == []
        await admin.ask(revision)
        listed = (await admin.adapters())[revision]
        assert (listed["state"], len(listed["notes"])) == ("loaded", 1)
        assert "regular expression" in listed["notes"][0]


async def test_an_adapter_whose_base_is_not_known_is_judged_by_its_shapes(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    artifact = publish_unchecked(
        registry, write_adapter(tmp_path / "a"), base, base_model=BaseModelIdentity(id="somewhere/else")
    )
    await Gate(registry, base).check(artifact, LIMITS)


def poison(tensors: Tensors) -> None:
    next(iter(tensors.values()))[0, 0] = np.nan


def shrink(tensors: Tensors) -> None:
    for name in list(tensors):
        if name.endswith("q_proj.lora_A.weight"):
            tensors[name] = tensors[name][:, :16]


def lengthen(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.replace("layers.1.", "layers.7.")] = tensors[name]


@pytest.mark.parametrize(
    ("change", "config", "code"),
    [
        (poison, {}, "not_finite"),
        (shrink, {}, "base_mismatch"),
        (lengthen, {}, "base_mismatch"),
        (None, {"r": 8}, "rank_mismatch"),
        (None, {"use_dora": True}, "unsupported_dora"),
        (None, {"bias": "all"}, "unsupported_bias"),
        (None, {"modules_to_save": ["lm_head"]}, "unsupported_modules_to_save"),
        (None, {"init_lora_weights": "pissa"}, "unsupported_init"),
        (None, {"peft_type": "IA3"}, "unsupported_peft_type"),
        (None, {"lora_alpha": 10**6}, "scaling_out_of_range"),
    ],
)
async def test_a_wrong_adapter_is_refused_with_a_stable_code(
    registry: Registry, base: BaseModel, tmp_path: Path, change: Any, config: dict[str, Any], code: str
) -> None:
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a", change=change, **config), base)
    assert await code_of_refusal(registry, base, artifact) == code


async def test_an_adapter_of_another_base_is_refused_although_every_shape_fits(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    other = locate_base_model(str(write_base(tmp_path / "other", rms_norm_eps=1e-3)))
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a"), other)
    assert await code_of_refusal(registry, base, artifact) == "base_mismatch"


async def test_a_rank_above_the_engines_is_refused_with_the_argument_that_helps(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    shape = LoraShape(rank=20, alpha=8, target_modules=["q_proj"])
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a"), base, lora=shape)
    with pytest.raises(errors.InvalidArtifactError, match="--max-lora-rank 32") as caught:
        await Gate(registry, base).check(artifact, LIMITS)
    assert caught.value.code == "rank_too_large"


async def test_bytes_that_changed_on_disk_are_refused(registry: Registry, base: BaseModel, tmp_path: Path) -> None:
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a"), base)
    weights = artifact.path / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(content)
    assert await code_of_refusal(registry, base, artifact) == "damaged"


@pytest.mark.parametrize("is_seen_as_damage", [True, False])
async def test_an_adapter_that_is_deleted_while_its_bytes_are_read_is_not_refused(
    registry: Registry, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_seen_as_damage: bool
) -> None:
    artifact, gate = publish_unchecked(registry, write_adapter(tmp_path / "a"), base), Gate(registry, base)
    await gate.require_there(artifact)

    def lose(reference: str) -> list[str]:
        shutil.rmtree(artifact.path)
        if is_seen_as_damage:
            return ["adapter_model.safetensors is missing"]
        raise errors.StorageError("No such file or directory")

    monkeypatch.setattr(registry, "verify", lose)
    with pytest.raises(errors.ModelNotFoundError):
        await gate.check(artifact, LIMITS)
    with pytest.raises(errors.ModelNotFoundError):
        await gate.require_there(artifact)


async def test_an_adapter_that_is_deleted_after_its_bytes_were_found_whole_is_not_there(
    registry: Registry, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, verify = publish_unchecked(registry, write_adapter(tmp_path / "a"), base), registry.verify

    def verify_and_lose(reference: str) -> list[str]:
        problems = verify(reference)
        shutil.rmtree(artifact.path)
        return problems

    monkeypatch.setattr(registry, "verify", verify_and_lose)
    with pytest.raises(errors.ModelNotFoundError):
        await Gate(registry, base).check(artifact, LIMITS)


async def test_a_disk_that_fails_after_the_bytes_were_found_whole_is_the_disks_fault(
    registry: Registry, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a"), base)

    def fail(path: Path, **options: Any) -> None:
        raise OSError(errno.EIO, "made up")

    monkeypatch.setattr("serve.gate.check_adapter", fail)
    with pytest.raises(errors.StorageError, match="device failed"):
        await Gate(registry, base).check(artifact, LIMITS)


async def test_a_whole_model_is_no_adapter(registry: Registry, base: BaseModel, tmp_path: Path) -> None:
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a"), base, kind="merged", lora=None)
    assert await code_of_refusal(registry, base, artifact) == "not_an_adapter"


@pytest.mark.parametrize(("expected", "passes"), [([0, 0, 0], True), ([0, 1, 0], False)])
async def test_probes_are_replayed_and_every_token_must_agree(
    registry: Registry, base: BaseModel, tmp_path: Path, expected: list[int], passes: bool
) -> None:
    engine = FakeEngine()  # answers with token 0
    await engine.start()
    probes = [Probe(prompt_token_ids=[5, 6], completion_token_ids=expected)]
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a"), base, probes=probes)
    adapter = EngineAdapter(artifact.revision, 1, artifact.path)
    if passes:
        assert await Gate(registry, base).probe(artifact, engine, adapter) == 1.0
        return
    with pytest.raises(errors.InvalidArtifactError) as caught:
        await Gate(registry, base).probe(artifact, engine, adapter)
    assert caught.value.code == "probe_mismatch"


async def test_a_manifest_that_makes_the_rank_smaller_than_it_is_is_found_out(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    """The engine would hold rank 16 and the manifest says 4: only the files know better."""
    for rank, code in ((8, "manifest_mismatch"), (32, "rank_out_of_range")):
        folder = write_adapter(tmp_path / str(rank), tensors=adapter_tensors(rank=rank), r=rank)
        artifact = publish_unchecked(registry, folder, base, name=f"rank{rank}")
        assert await code_of_refusal(registry, base, artifact) == code


@pytest.mark.parametrize(
    ("prompt", "completion", "copies"),
    [([64], [1], 1), ([], [1], 1), ([1] * 120, [1] * 9, 1), ([1], [1], 65)],
    ids=["not in the vocabulary", "empty", "too long", "too many"],
)
async def test_probes_that_the_engine_could_not_take_are_refused_before_it_is_asked(
    registry: Registry, base: BaseModel, tmp_path: Path, prompt: list[int], completion: list[int], copies: int
) -> None:
    probes = [Probe(prompt_token_ids=prompt, completion_token_ids=completion)] * copies
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a"), base, probes=probes)
    assert await code_of_refusal(registry, base, artifact) == "probe_refused"


async def test_files_touched_after_they_passed_are_read_again_before_the_next_load(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a"), base)
    gate = Gate(registry, base)
    await gate.check(artifact, LIMITS)
    weights = artifact.path / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(content)
    with pytest.raises(errors.InvalidArtifactError) as caught:
        await gate.check(artifact, LIMITS)
    assert caught.value.code == "damaged"
    weights.unlink()
    with pytest.raises(errors.InvalidArtifactError):
        await gate.check(artifact, LIMITS)


async def test_files_are_looked_at_beside_the_event_loop(
    registry: Registry, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "a"), base)
    gate, looked = Gate(registry, base), set()
    really_stat = Path.stat

    def noted_stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        looked.add(threading.current_thread())
        return really_stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", noted_stat)
    for _ in range(2):
        await gate.check(artifact, LIMITS)
    assert looked
    assert threading.current_thread() not in looked
