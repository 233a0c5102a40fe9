"""``python -m tune`` as a person runs it, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from registry import Registry
from tests.tune.samples import chat_rows, write_jsonl
from tune.cli import main, print_schema
from tune.methods import LoraMethod
from tune.recipe_file import load_recipe, parse_recipe

RECIPE = """\
name: colours
base_model: {base}
stages:
  - kind: sft
    data: [{{path: chat.jsonl}}]
    validation: {{share: 0.2}}
    learning_rate: 1e-2
    max_steps: {steps}
"""


@pytest.fixture
def recipe(tmp_path: Path, base_dir: Path) -> Path:
    write_jsonl(tmp_path / "chat.jsonl", chat_rows(40))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(base=base_dir, steps=5))
    return path


def command(recipe: Path) -> list[str]:
    root = recipe.parent
    return [
        sys.executable,
        "-m",
        "tune",
        str(recipe),
        "--registry",
        str(root / "reg"),
        "--work-dir",
        str(root / "work"),
    ]


def test_a_recipe_becomes_a_revision_on_stdout(recipe: Path) -> None:
    done = subprocess.run([*command(recipe), "--alias", "live"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    artifact = Registry(recipe.parent / "reg").resolve("live")
    assert done.stdout == f"{artifact.revision}\n", "stdout holds the revision and nothing that a library says"
    assert "TensorBoard: tensorboard --logdir" in done.stderr
    assert "learning_rate = 0.01 (given in the recipe)" in done.stderr
    assert "torchao" not in done.stderr


def test_an_interrupt_stops_at_a_step_and_the_same_command_goes_on(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("max_steps: 5", "max_steps: 10000"))
    running = subprocess.Popen(command(recipe), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    for line in running.stderr:
        if "before training" in line:
            break
    os.kill(running.pid, signal.SIGINT)
    output, errors = running.communicate(timeout=60)
    assert (running.returncode, output) == (130, ""), errors
    assert "stopped (SIGINT); run the same command again to go on" in errors
    assert len(list((recipe.parent / "work" / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("kind: sft", "kind: sft\n    epoch: 3"), "unknown key 'epoch'; did you mean 'epochs'"),
        (("name: colours", "name: [colours"), "not valid YAML"),
    ],
)
def test_a_wrong_recipe_ends_with_a_reason_and_status_2(
    recipe: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
) -> None:
    recipe.write_text(recipe.read_text().replace(*change))
    assert main([str(recipe), "--registry", str(recipe.parent / "reg")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_explain_prints_a_recipe_that_runs_as_it_is_with_a_reason_for_every_choice(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(f"{recipe.read_text()}    scheduler: wsd\n")
    assert main([str(recipe), "--registry", str(recipe.parent / "reg"), "--explain"]) == 0
    printed = capsys.readouterr().out
    assert "# stage 1-sft: learning_rate = 0.01 (given in the recipe)" in printed
    assert "# stage 1-sft: packing = False (a chat batch counts rows)" in printed
    assert "# threads = " in printed
    explained = parse_recipe(yaml.safe_load(printed))
    assert explained.stages[0].max_length == 256, "the base's context length"
    assert explained.stages[0].final_weights == "last"
    assert (explained.stages[0].warmup_share, explained.stages[0].decay_share) == (0.05, 0.1)
    assert "# stage 1-sft: decay_share = 0.1 (the last tenth of the steps, as in MiniCPM)" in printed
    assert isinstance(explained.method, LoraMethod)
    assert explained.method.alpha == 2 * explained.method.rank
    assert "# method.alpha = " in printed
    assert not (recipe.parent / "work").exists()


def test_a_dry_run_tells_memory_and_time_and_publishes_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe), "--registry", str(recipe.parent / "reg"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"memory: \d\.\d\d GiB at the peak: .* weights, .* gradients and optimizer", printed)
    assert re.search(r"time: [\d.]+ s, of which [\d.]+ s to load the base", printed)
    assert re.search(r"stage 1-sft: 5 steps in [\d.]+ s", printed)
    assert Registry(recipe.parent / "reg").artifacts() == []


def test_the_schema_accepts_recipes_and_describes_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    print_schema()
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["required"]) == {"name", "base_model", "stages"}
    assert schema["additionalProperties"] is False
    undescribed = [
        name for name, given in schema["$defs"]["Stage"]["properties"].items() if not given.get("description")
    ]
    assert undescribed == ["data"]


def test_a_json_recipe_is_a_recipe(recipe: Path) -> None:
    path = recipe.with_suffix(".json")
    path.write_text(json.dumps(yaml.safe_load(recipe.read_text())))
    assert load_recipe(path) == load_recipe(recipe)


def test_a_dry_run_rehearses_every_stage_kind(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"prompt": "What colour is the door?", "chosen": "Red.", "rejected": "No idea, ask the cat."}
    write_jsonl(recipe.parent / "pairs.jsonl", [pair | {"prompt": f"Question {n}?"} for n in range(12)])
    given = yaml.safe_load(recipe.read_text())
    given["stages"].append({"kind": "dpo", "data": [{"path": "pairs.jsonl"}], "validation": {"share": 0.2}})
    recipe.write_text(yaml.safe_dump(given))
    assert main([str(recipe), "--registry", str(recipe.parent / "reg"), "--dry-run"]) == 0
    assert re.search(r"stage 2-dpo: \d+ steps in [\d.]+ s", capsys.readouterr().out)
