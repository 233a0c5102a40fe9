from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.tune.jobs.support import BASE, new_job
from tune.choices import choose_learning_rate
from tune.jobs.convert import job_recipe, resolve_hyperparameters
from tune.jobs.records import Hyperparameters, NewJob
from tune.jobs.requests import CapoBody, DpoHyperparametersBody, HyperparametersBody
from tune.methods import LoraMethod
from tune.recipe import Dpo, Recipe


def recipe_of(job: NewJob, *, rows: int = 100, validation_rows: int = 0) -> Recipe:
    return job_recipe(
        job, artifact_name="support", base_model=BASE, training_rows=rows, validation_rows=validation_rows
    )


def with_numbers(**changes: Any) -> NewJob:
    return new_job("file-1", hyperparameters=replace(Hyperparameters(3, 8, 1.0), **changes))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 8, 9, 12, 13, 16, 96, 251, 256])
def test_the_batch_is_exactly_the_one_asked_for(batch_size: int) -> None:
    stage = recipe_of(with_numbers(batch_size=batch_size)).stages[0]
    assert stage.micro_batch_size is not None
    assert stage.gradient_accumulation_steps is not None
    assert stage.micro_batch_size * stage.gradient_accumulation_steps == batch_size
    assert stage.micro_batch_size <= 8


def test_the_multiplier_scales_the_rate_that_tune_would_choose() -> None:
    usual = choose_learning_rate(LoraMethod(), recipe_of(with_numbers()).stages[0], 256).value
    for multiplier in (0.1, 1.0, 3.0):
        stage = recipe_of(with_numbers(learning_rate_multiplier=multiplier)).stages[0]
        assert choose_learning_rate(LoraMethod(), stage, 256).value == pytest.approx(usual * multiplier)


@pytest.mark.parametrize(("rows", "share"), [(10, None), (49, None), (50, 0.1), (5000, 0.1)])
def test_a_tenth_is_held_out_once_that_measures_something(rows: int, share: float | None) -> None:
    validation = recipe_of(with_numbers(), rows=rows).stages[0].validation
    assert (None if validation is None else validation.share) == share


def test_the_share_can_be_chosen_and_turned_off() -> None:
    half = recipe_of(replace(with_numbers(), extensions={"validation_share": 0.5}), rows=20).stages[0].validation
    assert half is not None
    assert half.share == 0.5
    assert recipe_of(replace(with_numbers(), extensions={"validation_share": 0}), rows=900).stages[0].validation is None


def test_a_validation_file_takes_the_place_of_the_share() -> None:
    validation = recipe_of(replace(with_numbers(), validation_file="file-2"), rows=900).stages[0].validation
    assert validation is not None
    assert (str(validation.path), validation.share) == ("file-2", None)


def test_only_a_share_that_the_client_asked_for_may_fail_its_job() -> None:
    for extensions, required in (({}, False), ({"validation_share": 0.1}, True)):
        validation = recipe_of(replace(with_numbers(), extensions=extensions)).stages[0].validation
        assert validation is not None
        assert (validation.share, validation.required) == (0.1, required)


@pytest.mark.parametrize(("validation_rows", "epochs"), [(10, 1), (100, 1), (101, 2), (1000, 10)])
def test_a_job_is_validated_each_epoch_and_less_often_where_that_is_dearer_than_training(
    validation_rows: int, epochs: int
) -> None:
    job = replace(with_numbers(), validation_file="file-2")
    stage = recipe_of(job, rows=100, validation_rows=validation_rows).stages[0]
    assert (stage.evaluate_every_epochs, stage.evaluate_every_steps) == (epochs, None)


@pytest.mark.parametrize(
    ("extensions", "expected"),
    [
        ({}, (None, 1)),
        ({"validation_share": 0}, (None, None)),
        ({"evaluate_every_steps": 7}, (7, None)),
        ({"stage": {"evaluate_every_steps": 7}}, (7, None)),
        ({"stage": {"evaluate_every_epochs": 2}}, (None, 2)),
        ({"stages": [{"kind": "cpt", "data": [{"path": "file-9"}]}, {"evaluate_every_epochs": 2}]}, (None, 2)),
        ({"stages": [{"kind": "cpt", "data": [{"path": "file-9"}]}, {}]}, (None, 1)),
    ],
)
def test_a_client_may_say_when_its_stage_is_validated(
    extensions: dict[str, Any], expected: tuple[int | None, int | None]
) -> None:
    *others, own = recipe_of(replace(with_numbers(), extensions=extensions)).stages
    assert (own.evaluate_every_steps, own.evaluate_every_epochs) == expected
    assert all(stage.evaluate_every_epochs is None for stage in others)


def test_extensions_reach_the_recipe() -> None:
    extensions = {"lora": {"rank": 8, "target_modules": ["q_proj"]}, "max_length": 64, "over_length": "drop"}
    recipe = recipe_of(replace(with_numbers(), extensions=extensions))
    assert isinstance(recipe.method, LoraMethod)
    assert (recipe.method.rank, recipe.method.target_modules) == (8, ("q_proj",))
    assert (recipe.stages[0].max_length, recipe.stages[0].over_length) == (64, "drop")


@pytest.mark.parametrize("rows", [10, 64, 500, 100_000])
def test_auto_always_becomes_a_number_in_the_range_clients_may_give(rows: int) -> None:
    numbers = resolve_hyperparameters(HyperparametersBody(), CapoBody(), rows=rows, has_validation_file=False)
    HyperparametersBody(
        n_epochs=numbers.n_epochs,
        batch_size=numbers.batch_size,
        learning_rate_multiplier=numbers.learning_rate_multiplier,
    )
    assert numbers.learning_rate_multiplier == 1.0


def test_given_numbers_stay_as_they_are() -> None:
    given = HyperparametersBody(n_epochs=5, batch_size=3, learning_rate_multiplier=0.25)
    numbers = resolve_hyperparameters(given, CapoBody(), rows=10, has_validation_file=False)
    assert numbers == Hyperparameters(5, 3, 0.25)


def test_what_a_recipe_can_say_the_capo_object_can_say() -> None:
    extensions = {
        "method": {"kind": "dora", "rank": 4, "extract_lora_rank": 8},
        "stage": {"scheduler": "linear", "neftune_alpha": 5.0, "clean": {"duplicates": "drop_exact"}},
        "evaluation": {"max_rows": 20},
        "exports": [{"kind": "merge"}],
        "alias": "support",
        "dtype": "float32",
    }
    recipe = recipe_of(replace(with_numbers(), extensions=extensions))
    stage = recipe.stages[0]
    assert (recipe.method.kind, recipe.dtype, recipe.promote_alias) == ("dora", "float32", "support")
    assert (stage.scheduler, stage.neftune_alpha, stage.clean.duplicates) == ("linear", 5.0, "drop_exact")
    assert recipe.evaluation is not None
    assert recipe.evaluation.max_rows == 20
    assert [export.kind for export in recipe.exports] == ["merge"]


def test_a_dpo_job_trains_a_dpo_stage_with_its_beta() -> None:
    given = DpoHyperparametersBody(beta=0.3)
    numbers = resolve_hyperparameters(given, CapoBody(), rows=100, has_validation_file=False, method="dpo")
    stage = recipe_of(replace(new_job("file-1", method="dpo"), hyperparameters=numbers)).stages[0]
    assert stage.kind == "dpo"
    assert stage.dpo is not None
    assert stage.dpo.beta == 0.3
    auto = resolve_hyperparameters(HyperparametersBody(), CapoBody(), rows=100, has_validation_file=False, method="dpo")
    assert auto.beta == Dpo().beta
