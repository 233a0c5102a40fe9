"""Trains a recipe in forked children, kills them at random moments, lets another child go on, and compares.

A moment is a random step and a random while after it, so that the kills spread over the run on a busy machine too.

    python -m tests.tune.killed_run ROOT KILLS < recipe.json > outcomes.json

A process of its own, because it forks: torch and transformers are imported once, and no thread runs yet.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from registry import Registry
from tune.progress import SilentObserver, StepMetrics
from tune.recipe_file import parse_recipe
from tune.session import run


class Teller(SilentObserver):
    """Writes a byte for each step."""

    def __init__(self, file: int) -> None:
        self._file = file

    def on_step(self, metrics: StepMetrics) -> None:
        os.write(self._file, b".")


def train(recipe: dict[str, Any], root: Path, work: Path, steps: int) -> None:
    """In a child, to its end. The resumed child says so by a file."""
    result = run(
        parse_recipe(recipe),
        registry=Registry(work / "registry"),
        work_dir=work / "run",
        observer=Teller(steps),
        recipe_dir=root,
    )
    weights = next(result.artifact.path.glob("*.safetensors"))
    outcome = {"weights": weights.read_bytes().hex(), "metrics": result.metrics, "steps": result.steps}
    (work / "outcome.json").write_text(json.dumps(outcome))


def fork(recipe: dict[str, Any], root: Path, work: Path) -> tuple[int, int]:
    """The child, and a pipe that gets a byte for each of its steps; the caller closes it."""
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(recipe, root, work, tells)
            status = 0
        finally:
            os._exit(status)
    os.close(tells)
    return child, told


def to_its_end(recipe: dict[str, Any], root: Path, work: Path) -> tuple[int, int]:
    """The exit status, and the number of steps."""
    child, told = fork(recipe, root, work)
    steps = 0
    while data := os.read(told, 4096):
        steps += len(data)
    os.close(told)
    return os.waitpid(child, 0)[1], steps


def main() -> None:
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    recipe = json.load(sys.stdin)
    whole = root / "whole"
    whole.mkdir()
    started = time.monotonic()
    status, steps = to_its_end(recipe, root, whole)
    assert status == 0, status
    seconds_per_step = (time.monotonic() - started) / steps
    expected = json.loads((whole / "outcome.json").read_text())
    chance = random.Random(7)
    outcomes = []
    for number in range(kills):
        work = root / f"killed-{number}"
        work.mkdir()
        child, told = fork(recipe, root, work)
        # 0: before the first one; the last: while the artifact is published.
        for _ in range(chance.randint(0, steps)):
            os.read(told, 1)
        time.sleep(chance.uniform(0.0, seconds_per_step))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        found = sorted(path.name for path in (work / "run" / "checkpoints").glob("*"))
        status, _ = to_its_end(recipe, root, work)
        got = json.loads((work / "outcome.json").read_text()) if status == 0 else None
        outcomes.append({"same": got == expected, "found": found, "status": status})
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
