"""Recipes: what is chosen, what is refused, and how the refusal helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from registry.errors import InvalidRequestError, NotFoundError
from tune.choices import (
    BatchShape,
    choose_batch,
    choose_epochs,
    choose_learning_rate,
    choose_max_length,
    choose_packing,
)
from tune.methods import FullMethod, LoraMethod
from tune.recipe import Recipe, Stage
from tune.recipe_file import load_recipe, parse_recipe


def recipe(**changes: Any) -> dict[str, Any]:
    return {"name": "support", "base_model": "capo-tiny", "stages": [stage()]} | changes


def stage(**changes: Any) -> dict[str, Any]:
    return {"kind": "sft", "data": [{"path": "train.jsonl"}]} | changes


@pytest.mark.parametrize(
    ("given", "param", "reason"),
    [
        (recipe(sead=1), None, "unknown key 'sead'; did you mean 'seed'"),
        (recipe(method={"kind": "lora", "rnak": 8}), "method", "did you mean 'rank'"),
        (recipe(stages=[stage(learnin_rate=1)]), "stages[0]", "did you mean 'learning_rate'"),
        (recipe(stages=[stage(), stage(data=[{"pth": "x"}])]), "stages[1].data[0]", "did you mean 'path'"),
        (recipe(stages=[stage(validation={"shar": 0.1})]), "stages[0].validation", "did you mean 'share'"),
        (recipe(zzzzqq=1), None, "unknown key 'zzzzqq'; allowed: name, base_model"),
        (recipe(method={"kind": "prefix"}), "method", "'lora', 'qlora', 'dora', 'full', 'freeze', got"),
        (recipe(method={"kind": "lora", "rank": 0}), "method.rank", "greater than or equal to 1, got 0"),
        (recipe(method={"kind": "lora", "target_modules": []}), "method", "target_modules is empty"),
        (recipe(stages=[]), "stages", "at least 1 item"),
        (recipe(stages=[stage(data=[])]), "stages[0].data", "at least 1 item"),
        (recipe(stages=[stage(kind="ppo")]), "stages[0].kind", "'sft', 'cpt', 'mixed' or 'dpo', got 'ppo'"),
        (recipe(stages=[stage(epochs=2, max_steps=5)]), "stages[0]", "epochs=2 and max_steps=5"),
        (recipe(stages=[stage(evaluate_every_steps=5)]), "stages[0]", "evaluate_every_steps=5 needs"),
        (recipe(stages=[stage(evaluate_every_epochs=1)]), "stages[0]", "evaluate_every_epochs=1 needs"),
        (
            recipe(stages=[stage(validation={"share": 0.1}, evaluate_every_steps=5, evaluate_every_epochs=2)]),
            "stages[0]",
            "steps=5 and evaluate_every_epochs=2 both",
        ),
        (
            recipe(stages=[stage(validation={"path": "x", "required": False})]),
            "stages[0].validation",
            "required=false is of share",
        ),
        (recipe(stages=[stage(validation={})]), "stages[0].validation", "either path or share"),
        (
            recipe(stages=[stage(validation={"path": "x", "share": 0.1})]),
            "stages[0].validation",
            "path=x and share=0.1",
        ),
        (recipe(stages=[stage(learning_rate=float("nan"))]), "stages[0].learning_rate", "finite number"),
        (recipe(stages=[stage(learning_rate="quick")]), "stages[0].learning_rate", "valid number.*got 'quick'"),
        (recipe(name="../x"), "name", "is not a name"),
        (recipe(promote_alias="support@0123456789abcdef"), "promote_alias", "is a revision"),
        ({"name": "x"}, "base_model", "Field required"),
        ([], None, "must be a mapping.*got list"),
    ],
)
def test_a_wrong_recipe_is_refused_naming_field_and_remedy(given: object, param: str | None, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        parse_recipe(given)
    assert caught.value.param == param


def test_yaml_and_json_give_the_same_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: support\nbase_model: capo-tiny\nmethod: {kind: lora, rank: 8}\n"
        "stages:\n  - kind: sft\n    data: [{path: train.jsonl, weight: 2}]\n    learning_rate: 1e-4\n"
    )
    same = recipe(
        method={"kind": "lora", "rank": 8},
        stages=[stage(data=[{"path": "train.jsonl", "weight": 2}], learning_rate=0.0001)],
    )
    assert load_recipe(path) == parse_recipe(same)


def test_a_recipe_survives_its_own_json() -> None:
    given = parse_recipe(recipe(stages=[stage(validation={"share": 0.2}), stage(kind="cpt")], method={"kind": "full"}))
    assert Recipe.model_validate(given.model_dump(mode="json")) == given


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"name: a\nname: b\n", "'name' is given twice"),
        (b"name: [", "not valid YAML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"", "must be a mapping"),
    ],
)
def test_a_broken_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=reason):
        load_recipe(path)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        load_recipe(tmp_path / "recipe.yaml")


def test_every_open_choice_explains_itself() -> None:
    """A field that may stay empty must say what happens then."""
    schema = Recipe.model_json_schema()
    records = {"Recipe": schema, **schema["$defs"]}
    silent = [
        f"{record}.{name}"
        for record, content in records.items()
        for name, field in content["properties"].items()
        if field.get("default", 0) is None and "description" not in field
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("method", "kind", "rate"),
    [
        (LoraMethod(), "sft", 2e-4),
        (LoraMethod(), "cpt", 1e-4),
        (FullMethod(), "sft", 2e-5),
        (FullMethod(), "cpt", 1e-5),
    ],
)
def test_the_learning_rate_follows_method_and_stage(method: LoraMethod | FullMethod, kind: str, rate: float) -> None:
    choice = choose_learning_rate(method, Stage.model_validate(stage(kind=kind)))
    assert choice.value == rate
    assert method.kind in choice.reason
    assert choose_learning_rate(method, Stage.model_validate(stage(learning_rate=0.5))).value == 0.5
    assert choose_learning_rate(method, Stage.model_validate(stage(kind=kind)), 4096).value == rate
    assert choose_learning_rate(method, Stage.model_validate(stage(kind=kind)), 512).value == pytest.approx(
        4**1.3 * rate
    )


@pytest.mark.parametrize(
    ("num_sequences", "epochs", "shape"),
    [
        (100_000, 3.0, BatchShape(8, 2)),
        (500, 3.0, BatchShape(4, 1)),
        (100, 3.0, BatchShape(2, 1)),
        (3, 1.0, BatchShape(2, 1)),
        (10, None, BatchShape(8, 2)),
    ],
)
def test_small_data_gets_small_batches(num_sequences: int, epochs: float | None, shape: BatchShape) -> None:
    assert choose_batch(Stage.model_validate(stage()), num_sequences, epochs).value == shape


def test_half_of_a_batch_shape_is_completed_from_the_other_half() -> None:
    given = Stage.model_validate(stage(micro_batch_size=4))
    assert choose_batch(given, 100_000, 3.0).value == BatchShape(4, 4)
    given = Stage.model_validate(stage(gradient_accumulation_steps=4))
    assert choose_batch(given, 100_000, 3.0).value == BatchShape(4, 4)
    given = Stage.model_validate(stage(micro_batch_size=64, gradient_accumulation_steps=3))
    assert choose_batch(given, 10, 1.0).value == BatchShape(64, 3)


def test_length_epochs_and_packing_are_chosen_with_reasons() -> None:
    sft, cpt = Stage.model_validate(stage()), Stage.model_validate(stage(kind="cpt"))
    assert choose_max_length(sft, 512).value == 512
    assert choose_max_length(sft, 131_072).value == 2048
    assert choose_max_length(sft, None).value == 2048
    longest = Stage.model_validate(stage(max_length=4096))
    assert choose_max_length(longest, 4096).value == choose_max_length(longest, None).value == 4096
    with pytest.raises(InvalidRequestError, match="max_length=4096 is more than the base's context of 2048 tokens"):
        choose_max_length(longest, 2048)
    assert (choose_epochs(sft, 10_000).value, choose_epochs(cpt, 10).value) == (3.0, 1.0)
    assert [choose_epochs(sft, rows).value for rows in (960, 400, 300, 10)] == [3.0, 8.0, 10.0, 10.0]
    assert choose_epochs(Stage.model_validate(stage(max_steps=7)), 10).value is None
    assert (choose_packing(sft).value, choose_packing(cpt).value) == (False, True)


@pytest.mark.parametrize(
    ("rope_type", "tokens"), [("default", 512), ("linear", 1024), ("dynamic", 1024), ("yarn", 512)]
)
def test_a_bases_context_is_as_long_as_its_rotary_positions_reach(tmp_path: Path, rope_type: str, tokens: int) -> None:
    """What vLLM 0.32 serves by default for such configurations."""
    from transformers import LlamaConfig

    from tune.model import base_shape

    rope = {"rope_type": rope_type, "rope_theta": 10000.0} | ({"factor": 2.0} if rope_type != "default" else {})
    LlamaConfig(hidden_size=64, max_position_embeddings=512, rope_parameters=rope).save_pretrained(tmp_path)
    assert base_shape(tmp_path).context_tokens == tokens


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert LoraMethod(rank=8).scaled_alpha == 16
    assert LoraMethod(rank=8, alpha=4).scaled_alpha == 4
