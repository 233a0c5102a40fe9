"""When a stage is validated, and what is held out of its rows where there is nothing to choose from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from registry.errors import InvalidDataError
from tests.tune.samples import chat_rows, write_jsonl
from tests.tune.workshop import Recorder, Workshop, weights_of
from tune.model import base_shape
from tune.recipe_file import parse_recipe
from tune.stages import ReadyStage, prepare_stage

NOT_ASKED_FOR = {"share": 0.1, "required": False}


def ready(rows: list[dict[str, Any]], directory: Path, base_dir: Path, tokenizer: Any, **stage: Any) -> ReadyStage:
    write_jsonl(directory / "rows.jsonl", rows)
    own = {"kind": "sft", "data": [{"path": "rows.jsonl"}], "epochs": 3} | stage
    recipe = parse_recipe({"name": "x", "base_model": str(base_dir), "stages": [own]})
    return prepare_stage(recipe, 0, tokenizer=tokenizer, base_shape=base_shape(base_dir), recipe_dir=directory)


@pytest.mark.parametrize("packing", [False, True])
def test_validations_at_epochs_ends_leave_the_weights_as_they_are(workshop: Workshop, packing: bool) -> None:
    heard = Recorder()
    stage = {"epochs": 3, "micro_batch_size": 5, "gradient_accumulation_steps": 1, "packing": packing}
    plain = workshop.run(workshop.recipe(stages=[workshop.sft(**stage)]), "plain")
    asked = workshop.recipe(stages=[workshop.sft(**stage, evaluate_every_epochs=1)])
    validated = workshop.run(asked, "validated", observer=heard)
    told = [step.step for step in heard.steps if step.valid_loss is not None]
    assert len(told) == 3
    assert told[-1] == len(heard.steps)
    if not packing:  # 32 rows in batches of 5
        assert told == [7, 14, 21]
    assert weights_of(validated.artifact) == weights_of(plain.artifact)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (2, 8), (3, 10), (9, 10)])
def test_so_many_epochs_become_steps_and_the_manifest_can_be_read_again(
    tmp_path: Path, base_dir: Path, tokenizer: Any, epochs: int, steps: int
) -> None:
    """20 of 25 rows, in batches of 5, two epochs and a half of them."""
    made = ready(
        chat_rows(25),
        tmp_path,
        base_dir,
        tokenizer,
        validation={"share": 0.2},
        epochs=2.5,
        micro_batch_size=5,
        gradient_accumulation_steps=1,
        evaluate_every_epochs=epochs,
        early_stopping={"patience": 2},
    )
    assert (made.stage.evaluate_every_steps, made.stage.evaluate_every_epochs) == (steps, None)
    assert type(made.stage).model_validate(made.stage.model_dump()) == made.stage


@pytest.mark.parametrize("faulty", ["data[1]", "validation"])
def test_a_fault_names_the_field_of_the_file_that_has_it(
    tmp_path: Path, base_dir: Path, tokenizer: Any, faulty: str
) -> None:
    write_jsonl(tmp_path / "faulty.jsonl", [{"messages": []}])
    write_jsonl(tmp_path / "good.jsonl", chat_rows(5))
    second, validation = ("faulty", "good") if faulty == "data[1]" else ("good", "faulty")
    with pytest.raises(InvalidDataError, match=r"faulty\.jsonl") as refused:
        ready(
            chat_rows(5),
            tmp_path,
            base_dir,
            tokenizer,
            data=[{"path": "rows.jsonl"}, {"path": f"{second}.jsonl"}],
            validation={"path": f"{validation}.jsonl"},
        )
    assert refused.value.param == f"stages[0].{faulty}"


def test_a_share_that_nobody_asked_for_is_not_held_out_of_equal_rows(
    tmp_path: Path, base_dir: Path, tokenizer: Any
) -> None:
    made = ready(chat_rows(1) * 60, tmp_path, base_dir, tokenizer, validation=NOT_ASKED_FOR)
    assert (len(made.data.examples), len(made.data.validation)) == (60, 0)
    (warning,) = [note.message for note in made.notes if note.level == "warn"]
    assert "all rows are equal, so none is held out" in warning


def test_one_row_that_differs_is_enough_to_hold_some_out(tmp_path: Path, base_dir: Path, tokenizer: Any) -> None:
    rows = [*chat_rows(1) * 59, *chat_rows(2)[1:]]
    made = ready(rows, tmp_path, base_dir, tokenizer, validation=NOT_ASKED_FOR)
    assert {len(made.data.examples), len(made.data.validation)} == {1, 59}
    assert not [note for note in made.notes if note.level == "warn"]


def test_a_share_that_was_asked_for_is_refused_of_equal_rows(tmp_path: Path, base_dir: Path, tokenizer: Any) -> None:
    with pytest.raises(InvalidDataError, match="at least 2 different rows, got 1"):
        ready(chat_rows(1) * 60, tmp_path, base_dir, tokenizer, validation={"share": 0.1})
