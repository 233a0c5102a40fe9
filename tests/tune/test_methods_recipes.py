"""The recipes that show the orders of stages run on capo-tiny, each for a step or two."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.modes import generate
from registry import Registry
from tests.sizes import size
from tests.tune.workshop import Recorder
from tune.recipe import Recipe
from tune.recipe_file import load_recipe
from tune.session import run

pytestmark = pytest.mark.training

MODES = Path(generate.HERE).parent / "recipes" / "modes"
RECIPES = sorted(MODES.glob("*.yaml"))
STAGES = {
    "1-base-sft": ["sft"],
    "2-base-cpt-sft": ["cpt", "sft"],
    "3-base-cpt-general-sft-domain-sft": ["cpt", "sft", "sft"],
    "4-base-cpt-mixed-sft": ["cpt", "sft"],
    "5-base-mixed-cpt-mixed-sft": ["mixed", "sft"],
    "6-chat-sft": ["sft"],
    "7-chat-cpt-sft": ["cpt", "sft"],
    "8-chat-sft-dpo": ["sft", "dpo"],
}


def shortened(recipe: Recipe) -> Recipe:
    short = {"epochs": None, "max_steps": size(1, 5), "micro_batch_size": 2, "gradient_accumulation_steps": 1}
    stages = tuple(stage.model_copy(update={**short, "validation": None}) for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_order_of_stages_trains_and_publishes_one_adapter(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert [stage.kind for stage in recipe.stages] == STAGES[path.stem]
    observer = Recorder()
    registry = Registry(tmp_path / "registry")
    result = run(shortened(recipe), registry=registry, work_dir=tmp_path, observer=observer, recipe_dir=path.parent)
    trained = list(dict.fromkeys(metrics.stage for metrics in observer.steps))
    assert trained == [f"{number}-{kind}" for number, kind in enumerate(STAGES[path.stem], start=1)]
    assert result.artifact.manifest.kind == "lora"


def test_there_is_a_recipe_for_every_order() -> None:
    assert [path.stem for path in RECIPES] == sorted(STAGES)


def test_the_data_of_the_recipes_is_what_its_generator_writes(tmp_path: Path) -> None:
    generate.write_all(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (generate.HERE / path.name).read_bytes(), path.name
