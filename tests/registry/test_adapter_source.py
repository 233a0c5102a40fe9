"""What an import takes of the directories that trainers leave: the adapter, and nothing that lies beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from registry import Registry
from registry.errors import InvalidArtifactError
from tests.registry.samples import tree, write_adapter

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


def refusal(registry: Registry, source: Path) -> InvalidArtifactError:
    with pytest.raises(InvalidArtifactError) as caught:
        registry.import_adapter(source, name="support", base_model=None)
    assert registry.artifacts() == []
    assert list((registry.root / "staging").iterdir()) == []
    return caught.value


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def test_secrets_training_state_and_whatever_else_lies_beside_the_adapter_never_enter_the_registry(
    registry: Registry, source: Path
) -> None:
    (source / CARD).write_text("By whom and for what.")
    for path in (
        "training_args.bin", "optimizer.pt", ".env", ".git/config", ".cache/huggingface/x.lock", "manifest.json",
        "modeling.py", "Trainingskurve-\u00e4.png", f"checkpoint-10/{WEIGHTS}", "checkpoint-10/optimizer.pt",
    ):  # fmt: skip
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text("a secret")
    (source / "wandb").mkdir()
    for number in range(2_001):
        (source / "wandb" / str(number)).touch()
    (source / "latest").symlink_to("checkpoint-10")
    os.mkfifo(source / "pipe")
    artifact = registry.import_adapter(source, name="support", base_model=None)
    expected = {name: (source / name).read_bytes() for name in (CARD, CONFIG, WEIGHTS)}
    assert {name: content for name, content in tree(artifact.path).items() if name != "manifest.json"} == expected
    assert set(artifact.manifest.files) == set(expected)
    assert registry.verify(artifact.revision) == []
    assert b"a secret" not in b"".join(content or b"" for content in tree(registry.root).values())


def test_pickled_weights_alone_are_refused_with_the_way_to_convert_them(registry: Registry, source: Path) -> None:
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    error = refusal(registry, source)
    assert error.code == "pickle_not_allowed"
    assert "save_pretrained" in error.message


def test_where_only_directories_below_hold_adapters_they_are_named(registry: Registry, tmp_path: Path) -> None:
    output = tmp_path / "output"
    for step in (10, 20):
        write_adapter(output / f"checkpoint-{step}")
    (output / "runs").mkdir()
    error = refusal(registry, output)
    assert error.code == "no_adapter_weights"
    assert "'checkpoint-10', 'checkpoint-20'." in error.message


@pytest.mark.parametrize("name", ["model.safetensors", "new_embeddings.bin", "non_lora_trainables.bin"])
def test_weights_that_belong_to_the_adapter_and_are_not_served_are_refused(
    registry: Registry, source: Path, name: str
) -> None:
    (source / name).touch()
    error = refusal(registry, source)
    assert error.code == "extra_weights"
    assert name in error.message


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CARD])
@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("link", "links_not_allowed"),
        ("dangling link", "links_not_allowed"),
        ("hard link", "links_not_allowed"),
        ("fifo", "special_file_not_allowed"),
        ("directory", "special_file_not_allowed"),
    ],
)
def test_what_is_taken_must_be_a_plain_file(
    registry: Registry, source: Path, tmp_path: Path, name: str, kind: str, code: str
) -> None:
    path = source / name
    path.unlink(missing_ok=True)
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    match kind:
        case "link":
            path.symlink_to(secret)
        case "dangling link":
            path.symlink_to(tmp_path / "nowhere")
        case "hard link":
            path.hardlink_to(secret)
        case "fifo":
            os.mkfifo(path)
        case _:
            path.mkdir()
    assert refusal(registry, source).code == code
