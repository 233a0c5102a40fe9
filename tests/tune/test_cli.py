"""``python -m tune`` as a person runs it, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from registry import Registry
from tests.tune.samples import chat_rows, write_jsonl
from tune.cli import main

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
