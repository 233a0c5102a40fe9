"""Base models: where they are found and what their identity notices."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from registry import BaseModelIdentity, Registry, fingerprint, identify, locate_base_model
from registry.adapter_shapes import read_base_shapes
from registry.errors import InvalidArtifactError, UnavailableError
from tests.registry.samples import draft, tree, write_base


def test_the_identity_is_the_same_for_a_copy_and_names_the_digests_of_the_files(tmp_path: Path) -> None:
    first, copy = write_base(tmp_path / "first"), write_base(tmp_path / "copy")
    identity = identify("tiny", first)
    assert identity == identify("tiny", copy)
    assert identity.config_digest == hashlib.sha256((first / "config.json").read_bytes()).hexdigest()
    assert identity.chat_template_digest == hashlib.sha256(b"{{ messages }}").hexdigest()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("config.json", {"fingerprint", "config_digest"}),
        ("tokenizer.json", {"fingerprint", "tokenizer_digest"}),
        ("chat_template.jinja", {"chat_template_digest"}),
        ("model.safetensors", {"fingerprint"}),
        ("README.md", set()),
    ],
)
def test_a_changed_file_changes_exactly_its_digests(tmp_path: Path, name: str, changed: set[str]) -> None:
    directory = write_base(tmp_path / "tiny")
    before = identify("tiny", directory).model_dump()
    path = directory / name
    old = path.read_bytes() if path.exists() else b""
    path.write_bytes(old[:-1] + bytes([old[-1] ^ 1]) if name.endswith("safetensors") else old + b" ")
    after = identify("tiny", directory).model_dump()
    assert {key for key in before if before[key] != after[key]} == changed


def test_a_template_has_one_digest_wherever_transformers_keeps_it(tmp_path: Path) -> None:
    directory = write_base(tmp_path / "tiny")
    expected = identify("tiny", directory).chat_template_digest
    (directory / "chat_template.jinja").unlink()
    assert identify("tiny", directory).chat_template_digest is None
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert identify("tiny", directory).chat_template_digest == expected


def test_the_fingerprint_samples_large_weights_from_end_to_end(tmp_path: Path) -> None:
    directory = write_base(tmp_path / "tiny")
    values = np.zeros(4_000_000, np.uint8)
    save_file({"large": values}, directory / "large.safetensors")
    whole = fingerprint(directory)
    size = (directory / "large.safetensors").stat().st_size
    # 64 pieces of 4 KiB: the first and last bytes are in one of them, and about 6.5 % of the others.
    noticed = 0
    for position in (0, values.size - 1, *range(1000, values.size, 40_000)):
        changed = values.copy()
        changed[position] = 1
        save_file({"large": changed}, directory / "large.safetensors")
        assert (directory / "large.safetensors").stat().st_size == size
        if fingerprint(directory) != whole:
            noticed += 1
        else:
            assert position not in (0, values.size - 1)
    assert 2 <= noticed < 40


def test_a_renamed_or_resized_weights_file_changes_the_fingerprint(tmp_path: Path) -> None:
    directory = write_base(tmp_path / "tiny")
    before = fingerprint(directory)
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    assert fingerprint(directory) != before


@pytest.mark.parametrize("config", [{"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}])
def test_a_base_that_wants_to_run_its_own_code_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    directory = write_base(tmp_path / "tiny", **config)
    with pytest.raises(InvalidArtifactError) as caught:
        locate_base_model(str(directory))
    assert caught.value.code == "custom_code_not_allowed"


def test_a_directory_without_safetensors_weights_is_no_base(tmp_path: Path) -> None:
    directory = write_base(tmp_path / "tiny")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(InvalidArtifactError, match="no base model"):
        locate_base_model(str(directory))


def test_a_merged_artifact_is_a_base_under_its_revision(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    source = write_base(tmp_path / "tiny")
    artifact = registry.publish(source, draft("merged-tiny", base_model=BaseModelIdentity(id="tiny")))
    base = locate_base_model(f"merged-tiny@{artifact.digest[:10]}", registry)
    assert (base.id, base.path) == (artifact.revision, artifact.path)
    assert base.identity.fingerprint == fingerprint(source)


def test_the_embedded_model_is_always_there_and_wins_over_a_directory_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_base(tmp_path / "capo-tiny")
    monkeypatch.chdir(tmp_path)
    base = locate_base_model("capo-tiny")
    assert base.id == "capo-tiny"
    assert base.path != tmp_path / "capo-tiny"
    assert base.identity.chat_template_digest is not None
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(tree(base.path))


def test_a_downloaded_model_is_found_in_the_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds links to blobs, which must not keep anybody from reading headers."""
    blobs = write_base(tmp_path / "blobs", model_type="something-new")
    revision = "0123456789012345678901234567890123456789"
    repository = tmp_path / "hub" / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = locate_base_model("acme/tiny")
    assert base.id == "acme/tiny"
    assert base.identity.fingerprint == fingerprint(blobs)
    assert read_base_shapes(base.path).modules["model.layers.0.mlp.down_proj"].in_features == 48
    with pytest.raises(UnavailableError, match="capo-tiny"):
        locate_base_model("acme/absent")
