"""The example data: repeatable, well formed, and held out for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam
from pydantic import TypeAdapter

from examples.capo_tiny import build
from examples.capo_tiny.dialogues import training_rows
from examples.capo_tiny.questions import held_out_questions, known_questions
from examples.capo_tiny.world import facts, other_values, world
from examples.tasks import generate
from tune.data.datafile import open_data
from tune.data.faults import RowFault
from tune.data.rows import check_rows, parse_chat_row
from tune.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
MESSAGES = TypeAdapter(list[ChatCompletionMessageParam])
TOOLS = TypeAdapter(list[ChatCompletionFunctionToolParam])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def question(row: dict[str, Any]) -> str:
    return row["messages"][-2]["content"]


def answer(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def task_rows(task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return rows(EXAMPLES / "tasks" / task / "train.jsonl"), rows(EXAMPLES / "tasks" / task / "held_out.jsonl")


@pytest.mark.parametrize("hash_seed", ["0", "1234"])
def test_another_process_generates_the_same_bytes(tmp_path: Path, hash_seed: str) -> None:
    """In a process of its own, because the order of sets depends on PYTHONHASHSEED."""
    script = (
        "import sys; from pathlib import Path\n"
        "from examples.capo_tiny import build; from examples.tasks import generate\n"
        "build.write_data(Path(sys.argv[1])); generate.write_all(Path(sys.argv[1]) / 'tasks')"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=True,
    )
    assert build.data_digests(tmp_path) == build.DIGESTS.read_text("utf-8")
    assert (tmp_path / "held_out.jsonl").read_bytes() == (EXAMPLES / "capo_tiny" / "held_out.jsonl").read_bytes()
    for task in generate.TASKS:
        for name in ("train.jsonl", "held_out.jsonl"):
            fresh, committed = tmp_path / "tasks" / task / name, EXAMPLES / "tasks" / task / name
            assert fresh.read_bytes() == committed.read_bytes(), committed


@pytest.mark.parametrize("task", generate.TASKS)
def test_no_held_out_message_of_a_task_is_a_training_message(task: str) -> None:
    train, held_out = task_rows(task)
    assert len(held_out) >= 20
    assert not {question(row) for row in train} & {question(row) for row in held_out}
    assert len({question(row) for row in train}) == len(train)


@pytest.mark.parametrize("task", ["support", "old-vale"])
def test_held_out_rows_are_made_of_words_that_training_rows_have(task: str) -> None:
    train, held_out = task_rows(task)
    seen = {word for row in train for word in words(question(row)) | words(answer(row))}
    for row in held_out:
        assert words(question(row)) | words(answer(row)) <= seen, row


def test_the_crier_is_asked_for_facts_that_its_training_never_tells() -> None:
    train, held_out = task_rows("crier")
    assert not {answer(row) for row in train} & {answer(row) for row in held_out}


def test_no_training_chat_asks_a_held_out_question() -> None:
    """Neither as it is nor in small letters, bare, or with a greeting before or a courtesy after it."""
    texts = "|".join(re.escape(exchange.question.lower().rstrip("?.!")) for exchange in held_out_questions())
    asks_one = re.compile(rf"([a-z ]+[!:] )?({texts})[?.!]*( [a-z ]+[.!])?")
    assert all(asks_one.fullmatch(f"hi! {exchange.question.lower()}") for exchange in held_out_questions())
    for row in training_rows(4_000, seed=1):
        for message in row["messages"]:
            if message["role"] == "user":
                assert not asks_one.fullmatch(message["content"].lower()), message


def test_every_held_out_question_can_be_answered_from_what_training_asks() -> None:
    known = {exchange.answer for exchange in known_questions()}
    assert {exchange.answer for exchange in held_out_questions()} <= known


def test_a_fact_is_never_its_own_wrong_value() -> None:
    for fact in facts():
        assert fact.slots[fact.relation.slot] not in other_values(fact)


def test_names_that_questions_are_asked_by_are_unique() -> None:
    tables = world()
    for table, key in (("people", "name"), ("people", "job"), ("people", "pet_name"), ("animals", "food")):
        values = [row[key] for row in tables[table]]
        assert len(set(values)) == len(values), (table, key)


def test_every_person_lives_at_a_place_and_has_a_job_that_the_world_describes() -> None:
    tables = world()
    assert {person["home"] for person in tables["people"]} == {place["place"] for place in tables["places"]}
    assert {person["job"] for person in tables["people"]} == {job["job"] for job in tables["jobs"]}


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.jsonl")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_rows_are_valid_for_openai_and_for_capo(path: Path) -> None:
    checked = [row for _, row in open_data(path).rows()]
    assert [row for row in checked if isinstance(row, RowFault)] == []
    assert len(checked) == len(rows(path))
    for row in rows(path):
        if "text" in row:
            continue  # OpenAI has no rows of running text
        MESSAGES.validate_python(row["messages"] if "messages" in row else row["input"]["messages"])
        MESSAGES.validate_python([*row.get("preferred_output", []), *row.get("non_preferred_output", [])])


def test_generated_chats_are_valid_for_openai_and_for_capo(tmp_path: Path) -> None:
    chats = list(training_rows(1_000, seed=3))
    assert any("tools" in row for row in chats)
    for row in chats:
        MESSAGES.validate_python(row["messages"])
        TOOLS.validate_python(row.get("tools", []))
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chats), "utf-8")
    assert check_rows(path, parse_chat_row, limit_errors=1).errors == ()


@pytest.mark.parametrize("task", generate.TASKS)
def test_each_task_has_a_recipe_that_finds_its_data(task: str) -> None:
    path = EXAMPLES / "recipes" / f"{task}.yaml"
    recipe = load_recipe(path)
    assert recipe.name == task
    assert recipe.base_model == "capo-tiny"
    for stage in recipe.stages:
        for source in stage.data:
            assert (path.parent / source.path).is_file()


def test_the_models_own_recipe_runs_both_stages_on_all_weights() -> None:
    recipe = load_recipe(EXAMPLES / "capo_tiny" / "recipe.yaml")
    assert recipe.method.kind == "full"
    assert [stage.kind for stage in recipe.stages] == ["cpt", "sft"]
