"""Trains a recipe in forked children, kills them at random moments, lets another child go on, and compares.

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
from tune.progress import SilentObserver
from tune.recipe_file import parse_recipe
from tune.session import run


def train(recipe: dict[str, Any], root: Path, work: Path) -> None:
    """In a child, to its end. The resumed child says so by a file."""
    result = run(
        parse_recipe(recipe),
        registry=Registry(work / "registry"),
        work_dir=work / "run",
        observer=SilentObserver(),
        recipe_dir=root,
    )
    weights = next(result.artifact.path.glob("*.safetensors"))
    outcome = {"weights": weights.read_bytes().hex(), "metrics": result.metrics, "steps": result.steps}
    (work / "outcome.json").write_text(json.dumps(outcome))


def fork(recipe: dict[str, Any], root: Path, work: Path) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(recipe, root, work)
            status = 0
        finally:
            os._exit(status)
    return child


def main() -> None:
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    recipe = json.load(sys.stdin)
    whole = root / "whole"
    whole.mkdir()
    started = time.monotonic()
    _, status = os.waitpid(fork(recipe, root, whole), 0)
    assert status == 0, status
    seconds = time.monotonic() - started
    expected = json.loads((whole / "outcome.json").read_text())
    chance = random.Random(7)
    outcomes = []
    for number in range(kills):
        work = root / f"killed-{number}"
        work.mkdir()
        child = fork(recipe, root, work)
        time.sleep(chance.uniform(0.0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = sorted(path.name for path in (work / "run" / "checkpoints").glob("*"))
        _, status = os.waitpid(fork(recipe, root, work), 0)
        got = json.loads((work / "outcome.json").read_text()) if status == 0 else None
        outcomes.append({"same": got == expected, "found": found, "status": status})
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
