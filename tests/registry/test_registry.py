"""Publish, resolve, alias, verify, remove: what each promises when nothing goes wrong."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import registry as registry_package
from registry import Artifact, BaseModelIdentity, Manifest, Probe, Registry
from registry.errors import (
    ConflictError,
    InvalidArtifactError,
    InvalidNameError,
    ModelNotFoundError,
    NotFoundError,
)
from registry.principal import Principal
from tests.registry.samples import draft, tree, write_files


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Registry:
    return Registry(tmp_path / "registry", clock=clock)


def _publish(registry: Registry, content: str, *, name: str = "support", **options: Any) -> Artifact:
    with registry.stage() as staging:
        (staging / "model.safetensors").write_text(content)
        return registry.publish(staging, draft(name), **options)


def test_the_digest_is_the_sha256_of_the_manifest_which_vouches_for_every_file(
    tmp_path: Path, registry: Registry
) -> None:
    source = write_files(tmp_path / "one", b"one")
    artifact = registry.publish(source, draft(seed=7, metrics={"loss": 0.5}))
    data = (artifact.path / "manifest.json").read_bytes()
    assert artifact.digest == hashlib.sha256(data).hexdigest() == artifact.path.name
    assert artifact.revision == f"support@{artifact.digest[:16]}"
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
    listed = json.loads(data)["files"]
    assert listed == {
        path: {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in tree(source).items()
        if content is not None
    }
    assert tree(source).items() <= tree(artifact.path).items()


def test_a_staged_directory_is_moved_and_another_one_is_copied(tmp_path: Path, registry: Registry) -> None:
    source = write_files(tmp_path / "one", b"one")
    registry.publish(source, draft())
    assert (source / "model-0.safetensors").read_bytes() == b"one"
    with registry.stage() as staging:
        (staging / "model.safetensors").write_text("x")
        inode = (staging / "model.safetensors").stat().st_ino
        artifact = registry.publish(staging, draft())
        assert not staging.exists()
    assert (artifact.path / "model.safetensors").stat().st_ino == inode


def test_what_is_staged_and_not_published_is_removed(registry: Registry) -> None:
    with registry.stage() as staging:
        (staging / "model.safetensors").write_text("x")
    assert not staging.exists()
    assert list((registry.root / "staging").iterdir()) == []


def test_the_same_content_published_later_is_the_same_revision(registry: Registry, clock: Clock) -> None:
    first = _publish(registry, "one")
    clock.now += 100
    again = _publish(registry, "one", alias="support", fine_tuned_name="ft:tiny:acme::a1")
    assert again == first
    assert again.manifest.created_at == 1_000_000
    assert registry.artifacts() == [first]
    assert _publish(registry, "one", name="other") != first


def test_aliases_revisions_prefixes_and_fine_tuned_names_resolve(registry: Registry) -> None:
    artifact = _publish(registry, "one", alias="prod", fine_tuned_name="ft:tiny:acme:support:a1")
    for reference in (
        "prod",
        "ft:tiny:acme:support:a1",
        artifact.revision,
        f"support@{artifact.digest}",
        f"support@{artifact.digest[:8]}",
    ):
        assert registry.resolve(reference) == artifact
    assert registry.artifact("support", artifact.digest) == artifact


@pytest.mark.parametrize("reference", ["support", "support@00000000", "ft:tiny:acme::a1", "other@3f9c0a7b"])
def test_what_does_not_exist_is_a_model_not_found(registry: Registry, reference: str) -> None:
    _publish(registry, "one")
    with pytest.raises(ModelNotFoundError, match="does not exist") as caught:
        registry.resolve(reference)
    assert caught.value.param == "model"


def test_a_fine_tuned_name_is_set_once(registry: Registry) -> None:
    first = _publish(registry, "one", fine_tuned_name="ft:tiny:acme::a1")
    with pytest.raises(ConflictError, match="write-once"):
        _publish(registry, "two", fine_tuned_name="ft:tiny:acme::a1")
    assert registry.artifacts() == [first], "the refused publish left an artifact"
    assert registry.set_alias("ft:tiny:acme::a1", first.revision).write_once
    with pytest.raises(InvalidNameError, match="ft:"):
        _publish(registry, "two", fine_tuned_name="support")


@pytest.mark.parametrize("position", [0, 7, -1])
def test_verify_finds_a_single_flipped_bit(registry: Registry, position: int) -> None:
    artifact = _publish(registry, "some weights", alias="prod")
    path = artifact.path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    (problem,) = registry.verify("prod")
    assert "model.safetensors has sha256" in problem


def test_verify_finds_missing_resized_surplus_and_linked_files(registry: Registry, tmp_path: Path) -> None:
    artifact = registry.publish(write_files(tmp_path / "one", b"one"), draft())
    (artifact.path / "model-0.safetensors").unlink()
    (artifact.path / "model-1.safetensors").unlink()
    (artifact.path / "model-1.safetensors").write_bytes(b"short")
    (artifact.path / "extra.json").write_text("{}")
    problems = registry.verify(artifact.revision)
    assert problems == [
        "model-0.safetensors is missing",
        "model-1.safetensors has 5 bytes, the manifest says 6",
        "extra.json is not in the manifest",
    ]
    (artifact.path / "model-0.safetensors").symlink_to("/etc/hostname")
    assert any("symbolic link" in problem for problem in registry.verify(artifact.revision))


def test_an_artifact_with_a_changed_manifest_is_hidden_and_verify_says_why(registry: Registry) -> None:
    artifact = _publish(registry, "one", alias="prod")
    whole = _publish(registry, "two")
    manifest = artifact.path / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_bytes(manifest.read_bytes().replace(b'"merged"', b'"gptq"  '))
    assert registry.artifacts() == [whole]
    with pytest.raises(ModelNotFoundError):
        registry.resolve("prod")
    (problem,) = registry.verify("prod")
    assert "sha256" in problem


def test_a_damaged_artifact_is_replaced_by_publishing_the_same_content(registry: Registry, tmp_path: Path) -> None:
    source = write_files(tmp_path / "one", b"one")
    artifact = registry.publish(source, draft(), alias="prod")
    path = artifact.path / "model-0.safetensors"
    path.chmod(0o644)
    path.write_bytes(b"0ne")
    assert registry.publish(source, draft()) == artifact
    assert registry.verify("prod") == []


def test_readers_ignore_whatever_is_no_artifact(registry: Registry) -> None:
    artifact = _publish(registry, "one")
    artifacts = registry.root / "artifacts"
    (artifacts / "support" / ("0" * 64)).mkdir()
    (artifacts / "support" / "notes").mkdir()
    (artifacts / "support" / ("1" * 64)).symlink_to(artifact.path)
    (artifacts / "support" / ("2" * 64)).write_text("file")
    (artifacts / "Not A Name").mkdir()
    (artifacts / "lost+found").mkdir()
    (artifacts / "file").write_text("")
    (artifacts / "linked").symlink_to(artifacts / "support")
    (registry.root / "aliases" / "bad.json").write_text("{")
    (registry.root / "aliases" / "README").write_text("")
    copied = artifacts / "other" / artifact.digest
    copied.mkdir(parents=True)
    (copied / "manifest.json").write_bytes((artifact.path / "manifest.json").read_bytes())
    fresh = Registry(registry.root, read_only=True)
    assert fresh.artifacts() == [artifact]
    assert fresh.aliases() == []
    fresh.change_token()


def test_an_alias_in_use_protects_its_artifact_unless_forced(registry: Registry) -> None:
    artifact = _publish(registry, "one", alias="prod")
    with pytest.raises(ConflictError, match="in use by prod"):
        registry.remove(artifact.revision)
    registry.remove(artifact.revision, force=True)
    assert registry.artifacts() == []
    assert registry.aliases() == []
    assert list((registry.root / "trash").iterdir()) == []


def test_a_base_in_use_protects_its_artifact(registry: Registry) -> None:
    base = _publish(registry, "base", name="merged-base")
    with registry.stage() as staging:
        (staging / "model.safetensors").write_text("tuned")
        identity = BaseModelIdentity(id=base.revision)
        tuned = registry.publish(staging, draft("tuned", base_model=identity), alias="prod")
    with pytest.raises(ConflictError, match="in use by tuned@"):
        registry.remove(base.revision)
    assert registry.gc(keep_unaliased=0, min_age_seconds=0).removed_revisions == ()
    registry.remove(tuned.revision, force=True)
    registry.gc(keep_unaliased=0, min_age_seconds=0)
    assert registry.artifacts() == []


def test_gc_keeps_what_is_aliased_young_recent_or_a_rollback_target(registry: Registry, clock: Clock) -> None:
    artifacts = []
    for index in range(6):
        artifacts.append(_publish(registry, str(index), alias="prod"))
        clock.now += 1000
    clock.now += 1500
    loose = _publish(registry, "young")
    report = registry.gc(keep_unaliased=0, min_age_seconds=3000)
    # The alias left artifact 4 at +5000 (rollback target) and 3 at +4000; the time is +7500, so 0 to 3 are old enough.
    assert set(report.removed_revisions) == {artifact.revision for artifact in artifacts[:4]}
    assert registry.artifacts() == [artifacts[4], artifacts[5], loose]
    assert report.freed_bytes > 0
    assert registry.rollback_alias("prod").revision == artifacts[4].revision


def test_gc_keeps_the_newest_unaliased_revisions_of_each_name(registry: Registry, clock: Clock) -> None:
    kept = []
    for name in ("first", "second"):
        for index in range(4):
            kept.append(_publish(registry, f"{name}{index}", name=name))
            clock.now += 1
    assert registry.gc().removed_revisions == ()
    registry.gc(keep_unaliased=2, min_age_seconds=0)
    assert registry.artifacts() == [*kept[2:4], *kept[6:8]]


def test_gc_takes_the_directories_of_names_that_have_nothing_left(registry: Registry) -> None:
    folder = registry.root / "artifacts"
    for name in ("kept", "removed", "collected", "stranger"):
        _publish(registry, "one", name=name, **({"alias": name} if name in ("kept", "stranger") else {}))
    (folder / "stranger" / "notes.txt").touch()
    registry.remove(registry.resolve("stranger").revision, force=True)
    (removed,) = registry.artifacts("removed")
    registry.remove(removed.revision)
    (folder / "not a name").mkdir()
    registry.gc(keep_unaliased=0, min_age_seconds=-10)
    assert sorted(path.name for path in folder.iterdir()) == ["kept", "not a name", "stranger"]
    again = _publish(registry, "one", name="removed")
    assert registry.verify(again.revision) == []


def test_gc_refuses_to_guess_when_an_alias_is_damaged(registry: Registry) -> None:
    _publish(registry, "one", alias="prod")
    path = registry.root / "aliases" / "prod.json"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InvalidArtifactError, match="damaged"):
        registry.gc(keep_unaliased=0, min_age_seconds=0)
    assert len(registry.artifacts()) == 1


def test_reserved_names_are_refused_for_artifacts_and_aliases(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    artifact = _publish(registry, "one")
    base = artifact.manifest.base_model.id
    with pytest.raises(InvalidNameError, match="reserved"):
        _publish(registry, "one", name=base)
    for name in (base, "text", "default"):
        with pytest.raises(InvalidNameError, match="reserved"):
            _publish(registry, "one", alias=name)
        for change in (registry.set_alias, registry.check_alias):
            with pytest.raises(InvalidNameError, match="reserved"):
                change(name, artifact.revision)
    assert registry.aliases() == []


def test_opening_what_is_no_registry_says_so(tmp_path: Path) -> None:
    for options in ({"create": False}, {"read_only": True}):
        with pytest.raises(NotFoundError, match="no registry"):
            Registry(tmp_path / "missing", **options)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(ConflictError, match="not empty"):
        Registry(tmp_path / "home")
    newer = tmp_path / "newer"
    Registry(newer)
    (newer / "registry.json").write_text('{"format": "capo-registry", "schema_version": 2}')
    with pytest.raises(InvalidArtifactError, match="newer"):
        Registry(newer)


def test_a_manifest_of_a_newer_schema_says_so() -> None:
    manifest = Manifest.from_draft(draft(), files={}, created_at=1)
    data = json.loads(manifest.to_bytes()) | {"schema_version": 2, "new_field": 1}
    with pytest.raises(InvalidArtifactError, match="schema version 2"):
        Manifest.from_bytes(json.dumps(data).encode())


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../b", "a//b", "", ".", "a\\b", "a\0", "manifest.json", "é"]
)
def test_a_manifest_never_names_a_file_outside_its_directory(path: str) -> None:
    manifest = Manifest.from_draft(draft(), files={}, created_at=1)
    data = json.loads(manifest.to_bytes())
    data["files"] = {path: {"size_bytes": 1, "sha256": "0" * 64}}
    with pytest.raises(InvalidArtifactError, match="Not a manifest"):
        Manifest.from_bytes(json.dumps(data).encode())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    recipe=st.dictionaries(st.text(max_size=8), _JSON, max_size=4),
    loss=st.floats(allow_nan=False, allow_infinity=False),
)
def test_a_manifest_reads_back_as_written_or_is_refused(recipe: dict[str, Any], loss: float) -> None:
    probe = Probe(prompt_token_ids=[1, 2], completion_token_ids=[3])
    manifest = Manifest.from_draft(draft(recipe=recipe, metrics={"loss": loss}, probes=[probe]), files={}, created_at=1)
    try:
        data = manifest.to_bytes()
    except InvalidArtifactError:
        return
    assert Manifest.from_bytes(data) == manifest
    assert Manifest.from_bytes(data).to_bytes() == data


def test_a_recipe_with_nan_is_refused_and_nothing_is_published(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifactError, match="JSON"):
        registry.publish(write_files(tmp_path / "one", b"one"), draft(recipe={"lr": float("nan")}))
    assert registry.artifacts() == []
    assert list((registry.root / "staging").iterdir()) == []


def test_a_kind_and_its_lora_shape_belong_together() -> None:
    with pytest.raises(ValueError, match="lora"):
        draft(kind="lora")


def test_a_thousand_artifacts_are_listed_quickly_once_known(registry: Registry) -> None:
    manifest = Manifest.from_draft(draft("many"), files={}, created_at=1)
    for index in range(1000):
        data = manifest.model_copy(update={"seed": index}).to_bytes()
        directory = registry.root / "artifacts" / "many" / hashlib.sha256(data).hexdigest()
        directory.mkdir(parents=True)
        (directory / "manifest.json").write_bytes(data)
    assert len(registry.artifacts()) == 1000
    times = []
    for _ in range(5):
        started = time.perf_counter()
        registry.artifacts()
        times.append(time.perf_counter() - started)
    assert min(times) < 0.2


def test_importing_the_registry_stays_light() -> None:
    script = (
        "import sys, registry; "
        "heavy = {'torch', 'transformers', 'vllm', 'fastapi', 'grpc', 'numpy', 'safetensors', 'peft', "
        "'huggingface_hub', 'sqlalchemy', 'uvicorn'}; print(sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_example_of_the_package_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (registry_package.__doc__ or "").splitlines()
    example = "\n".join(re.sub("^    ", "", line) for line in lines if line.startswith("    "))
    assert "registry.publish" in example
    subprocess.run(
        [sys.executable, "-c", example],
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(registry_package.__file__).parents[1])},
    )


def test_the_public_names_are_the_ones_that_exist() -> None:
    assert sorted(registry_package.__all__) == sorted(set(registry_package.__all__))
    assert all(hasattr(registry_package, name) for name in registry_package.__all__)


def _damaged_by(registry: Registry, change: Callable[[Path], object]) -> dict[str, str]:
    """The code that each damaged directory is listed with, after ``change`` was done to that of one artifact."""
    artifact = registry.publish(write_files(registry.root.parent / "files", b"one"), draft("support"))
    untouched = registry.publish(write_files(registry.root.parent / "more", b"two"), draft("other"))
    change(artifact.path)
    found, damaged = Registry(registry.root).survey()
    assert found == [untouched]
    assert [each.revision for each in damaged] == [artifact.revision]
    with pytest.raises(ModelNotFoundError):
        Registry(registry.root).resolve(artifact.revision)
    return {each.name: each.error.code for each in damaged}


def _link_manifest(directory: Path) -> None:
    (directory / "manifest.json").rename(directory / "elsewhere")
    (directory / "manifest.json").symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda directory: (directory / "manifest.json").unlink(), "no_manifest"),
        (lambda directory: (directory / "manifest.json").write_bytes(b"{}"), "digest_mismatch"),
        (_link_manifest, "links_not_allowed"),
    ],
)
def test_a_directory_that_is_no_artifact_means_nothing_and_is_listed_with_its_fault(
    tmp_path: Path, change: Callable[[Path], object], code: str
) -> None:
    assert _damaged_by(Registry(tmp_path / "registry"), change) == {"support": code}


def test_only_who_may_change_what_is_nobodys_sees_what_is_damaged(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    _damaged_by(registry, lambda directory: (directory / "manifest.json").unlink())
    assert len(registry.on_behalf_of(Principal.local("capo")).survey()[1]) == 1
    assert registry.on_behalf_of(Principal("acme", "key_1", frozenset())).survey()[1] == []
