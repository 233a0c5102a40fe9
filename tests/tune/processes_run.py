"""Trains recipes in several processes at once, as a launcher would start them, each forked from one warm process.

    python -m tests.tune.processes_run ROOT < runs.json > outcomes.json

A process of its own, because it forks: torch and transformers are imported once, and no thread runs yet.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - seconds that each child would take
import torch.distributed.fsdp  # noqa: F401

from registry import Registry
from tests.ports import free_port
from tests.tune.workshop import Recorder, StopAfter
from tune.progress import StopRequested
from tune.recipe_file import parse_recipe
from tune.session import run


def train(given: dict[str, Any], root: Path) -> dict[str, Any]:
    """``given``: recipe, work (a name), processes, and stop_after: the step at whose end the run is stopped."""
    recorder = Recorder()
    outcome: dict[str, Any] = {}
    try:
        result = run(
            parse_recipe(given["recipe"]),
            registry=Registry(root / "registry"),
            work_dir=root / given["work"],
            observer=recorder,
            should_stop=StopAfter(given.get("stop_after", 10**9)),
            recipe_dir=root,
        )
        outcome = {"artifact": str(result.artifact.path), "metrics": result.metrics}
    except StopRequested:
        outcome = {"artifact": None, "metrics": {}}
    events = {key: value for event in recorder.events for key, value in event.data.items()}
    return outcome | {"losses": [step.train_loss for step in recorder.steps], "events": events}


def fork(given: dict[str, Any], rank: int, port: int, root: Path) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            size = given["processes"]
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "RANK": rank}
            os.environ.update({name: str(value) for name, value in (where | {"LOCAL_RANK": rank}).items()})
            (root / f"outcome-{rank}.json").write_text(json.dumps(train(given, root)))
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def main() -> None:
    root = Path(sys.argv[1])
    outcomes = []
    for given in json.load(sys.stdin):
        port = free_port()
        children = [fork(given, rank, port, root) for rank in range(given["processes"])]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        assert not any(statuses), statuses
        outcomes.append([json.loads((root / f"outcome-{rank}.json").read_text()) for rank in range(len(children))])
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
