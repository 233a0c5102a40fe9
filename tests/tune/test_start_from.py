"""Training that goes on from an adapter instead of from the base alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from capo.cli import app
from registry import Registry
from registry.errors import InvalidRequestError, ModelNotFoundError
from tests.tune.samples import chat_rows, write_jsonl
from tests.tune.test_methods_dpo import preference_rows
from tests.tune.workshop import Recorder, StopAfter, Workshop, weights_of
from tune.progress import StopRequested
from tune.recipe_file import parse_recipe
from tune.session import TrainingResult

FIRST = "ft:tiny-base:acme::first"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> tuple[Registry, TrainingResult]:
    """An adapter of an unusual shape, with one layer that differs."""
    root = tmp_path_factory.mktemp("first")
    write_jsonl(root / "chat.jsonl", chat_rows(40))
    workshop = Workshop(root, base_dir, Registry(root / "registry"))
    method = {
        "kind": "lora",
        "rank": 4,
        "alpha": 12,
        "target_modules": ["q_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {r"layers\.1\.mlp\.down_proj": 2},
    }
    result = workshop.run(workshop.recipe(method=method), "first", alias="live", fine_tuned_name=FIRST)
    return workshop.registry, result


@pytest.fixture
def first(trained: tuple[Registry, TrainingResult]) -> TrainingResult:
    return trained[1]


@pytest.fixture
def workshop(tmp_path: Path, base_dir: Path, trained: tuple[Registry, TrainingResult]) -> Workshop:
    """Its own files and work directories; the registry of the first adapter."""
    write_jsonl(tmp_path / "chat.jsonl", chat_rows(40))
    return Workshop(tmp_path, base_dir, trained[0])


def going_on(workshop: Workshop, **changes: Any) -> dict[str, Any]:
    stage = workshop.sft(epochs=None, max_steps=6, micro_batch_size=4, gradient_accumulation_steps=1)
    return workshop.recipe(start_from="live", name="second", stages=[stage]) | changes


def test_it_begins_where_the_adapter_ended(workshop: Workshop, first: TrainingResult) -> None:
    result = workshop.run(going_on(workshop))
    before = result.metrics["1-sft.before_valid_loss"]
    assert before == pytest.approx(first.metrics["1-sft.valid_loss"], rel=1e-5)
    assert "1-sft.base_valid_loss" not in result.metrics, "it is not the base that was measured"
    assert result.metrics["1-sft.valid_loss"] < before


def test_a_step_without_a_rate_gives_the_same_adapter(workshop: Workshop, first: TrainingResult) -> None:
    stage = workshop.sft(epochs=None, max_steps=1, learning_rate=1e-30)
    result = workshop.run(going_on(workshop, stages=[stage]))
    found = load_file(result.artifact.path / "adapter_model.safetensors")
    expected = load_file(first.artifact.path / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_shape_and_lineage_stand_in_the_manifest(workshop: Workshop, first: TrainingResult) -> None:
    result = workshop.run(going_on(workshop))
    manifest = result.artifact.manifest
    assert manifest.lora == first.artifact.manifest.lora
    assert manifest.parents == [first.artifact.revision]
    assert manifest.recipe is not None
    assert manifest.recipe["start_from"] == first.artifact.revision, "the alias may move, what was started from not"
    assert (manifest.recipe["method"]["rank"], manifest.recipe["method"]["alpha"]) == (4, 12)


@pytest.mark.parametrize("reference", ["live", FIRST, "revision"])
def test_it_may_be_named_in_every_way(workshop: Workshop, first: TrainingResult, reference: str) -> None:
    name = first.artifact.revision if reference == "revision" else reference
    assert workshop.run(going_on(workshop, start_from=name)).artifact.manifest.parents == [first.artifact.revision]


def test_a_checkpoint_of_an_epoch_is_started_from_too(workshop: Workshop, first: TrainingResult) -> None:
    (checkpoint,) = workshop.registry.checkpoints(FIRST)
    result = workshop.run(going_on(workshop, start_from=checkpoint.alias))
    assert result.artifact.manifest.parents == [checkpoint.revision]
    measured = workshop.registry.resolve(checkpoint.alias).manifest.metrics["full_valid_loss"]
    assert result.metrics["1-sft.before_valid_loss"] == pytest.approx(measured, rel=1e-5)


def test_a_stopped_run_goes_on_exactly(workshop: Workshop, first: TrainingResult) -> None:
    whole = workshop.run(going_on(workshop), "whole")
    with pytest.raises(StopRequested):
        workshop.run(going_on(workshop), "stopped", should_stop=StopAfter(3))
    resumed = workshop.run(going_on(workshop), "stopped")
    assert weights_of(resumed.artifact) == weights_of(whole.artifact)


def test_another_adapter_is_another_run(workshop: Workshop, first: TrainingResult) -> None:
    """Its work directory does not go on from a checkpoint that began elsewhere."""
    with pytest.raises(StopRequested):
        workshop.run(going_on(workshop), "work", should_stop=StopAfter(3))
    (checkpoint,) = workshop.registry.checkpoints(FIRST)
    observer = Recorder()
    workshop.run(going_on(workshop, start_from=checkpoint.alias), "work", observer)
    assert observer.said("training starts over")


def test_preferences_are_measured_against_the_adapter(workshop: Workshop, first: TrainingResult) -> None:
    """At the first step policy and reference are one model, so the sigmoid loss is log 2; not so against the base."""
    write_jsonl(workshop.root / "preferences.jsonl", preference_rows(16))
    stage = {"kind": "dpo", "data": [{"path": "preferences.jsonl"}], "max_steps": 2, "learning_rate": 1e-3}
    observer = Recorder()
    workshop.run(going_on(workshop, stages=[stage]), observer=observer)
    assert observer.steps[0].train_loss == pytest.approx(math.log(2), abs=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "another rank": ({"method": {"kind": "lora", "rank": 8}}, "method.rank", "has 4"),
    "another alpha": ({"method": {"kind": "lora", "alpha": 8}}, "method.alpha", "has 12"),
    "other targets": ({"method": {"kind": "lora", "target_modules": ["q_proj"]}}, "method.target_modules", "down_proj"),
    "another scaling": ({"method": {"kind": "lora", "use_rslora": False}}, "method.use_rslora", "has True"),
    "starting values": ({"method": {"kind": "lora", "init": "gaussian"}}, "method.init", "starting values"),
}


@pytest.mark.parametrize(("changes", "param", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_another_shape_is_refused_with_the_reason(
    workshop: Workshop, first: TrainingResult, changes: dict[str, Any], param: str, reason: str
) -> None:
    observer = Recorder()
    with pytest.raises(InvalidRequestError, match=reason) as refused:
        workshop.run(going_on(workshop, **changes), observer=observer)
    assert refused.value.param == param
    assert not observer.steps


def test_the_same_shape_may_be_said_again(workshop: Workshop, first: TrainingResult) -> None:
    """So a resolved recipe, as it stands in the manifest, runs as it is."""
    result = workshop.run(going_on(workshop), "once")
    assert result.artifact.manifest.recipe is not None
    again = workshop.run(dict(result.artifact.manifest.recipe), "again")
    assert weights_of(again.artifact) == weights_of(result.artifact)


def test_what_is_no_adapter_of_this_base_is_refused(workshop: Workshop, first: TrainingResult) -> None:
    whole = workshop.run(workshop.recipe(method={"kind": "full"}, name="whole"), "full").artifact
    with pytest.raises(InvalidRequestError, match="whole model"):
        workshop.run(going_on(workshop, start_from=whole.revision))
    with pytest.raises(InvalidRequestError, match="another base"):
        workshop.run(going_on(workshop, base_model=whole.revision))
    with pytest.raises(ModelNotFoundError):
        workshop.run(going_on(workshop, start_from="nothing"))


@pytest.mark.parametrize("method", [{"kind": "dora"}, {"kind": "full"}, {"kind": "freeze", "last_layers": 1}])
def test_a_method_that_trains_no_plain_adapter_is_refused(workshop: Workshop, method: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="start_from"):
        parse_recipe(going_on(workshop, method=method))


def test_a_name_that_can_be_none_is_refused(workshop: Workshop) -> None:
    with pytest.raises(InvalidRequestError, match="not a name"):
        parse_recipe(going_on(workshop, start_from="../x"))


def test_the_command_line_starts_from_an_adapter(workshop: Workshop, first: TrainingResult, tmp_path: Path) -> None:
    recipe = going_on(workshop)
    del recipe["start_from"]
    path = workshop.root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = ["tune", str(path), "--registry", str(workshop.registry.root), "--work-dir", str(tmp_path / "cli")]
    done = CliRunner().invoke(app, [*command, "--start-from", "live"], catch_exceptions=False)
    made = workshop.registry.resolve(done.stdout.strip())
    assert made.manifest.parents == [first.artifact.revision]
    assert made.manifest.lora is not None
    assert made.manifest.lora.rank == 4
