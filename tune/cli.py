"""Training from the command line: ``python -m tune RECIPE.yaml --registry DIR [--work-dir DIR]``.

``capo tune`` calls these functions too. Under ``torchrun`` or ``accelerate launch`` the processes train together; the
first one speaks. torch is imported only after the thread settings are in place.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import yaml

from registry import Registry
from registry.errors import CapoError
from tune.observers import ProgressBar
from tune.progress import SilentObserver, StopRequested, TrainingEvent
from tune.recipe import Recipe
from tune.recipe_file import load_recipe, parse_recipe
from tune.threads import prepare_environment

if TYPE_CHECKING:
    from tune.estimate import Estimate
    from tune.preparation import Prepared
    from tune.session import TrainingResult

_EXIT_INVALID = 2
_EXIT_STOPPED = 130


def tune_recipe(
    recipe_path: Path,
    registry_dir: Path,
    work_dir: Path | None = None,
    alias: str | None = None,
    start_from: str | None = None,
) -> TrainingResult:
    """Train a recipe with a progress bar on stderr. The first Ctrl-C stops at the next step with a checkpoint.

    ``work_dir`` is ``runs/<name>`` when not given; the same directory resumes a stopped run. ``start_from`` takes the
    place of the recipe's.
    """
    recipe = _recipe(recipe_path, start_from)
    prepare_environment()
    hush_optional_libraries()
    from tune.session import (
        run,
        tensorboard_dir,
    )  # torch and transformers: seconds, and after the environment

    work_dir = work_dir or Path("runs") / recipe.name
    stop = _StopOnInterrupt()
    with stop, ExitStack() as stack:
        speaks = os.environ.get("RANK", "0") == "0"
        result = run(
            recipe,
            registry=Registry(registry_dir),
            work_dir=work_dir,
            observer=stack.enter_context(ProgressBar()) if speaks else SilentObserver(),
            should_stop=stop.reason,
            alias=alias,
            recipe_dir=recipe_path.parent,
        )
    if speaks:
        print(result.artifact.revision)
        print(f"TensorBoard: tensorboard --logdir {tensorboard_dir(work_dir)}", file=sys.stderr)
    return result


def explain_recipe(recipe_path: Path, registry_dir: Path, start_from: str | None = None) -> None:
    """Print the recipe with every open value filled in (YAML, runs as it is), and why each was chosen (comments).

    Reads all data; loads no model.
    """
    prepared = _prepare(recipe_path, registry_dir, start_from, say=lambda message: print(f"# {message}"))
    print(yaml.safe_dump(prepared.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")


def rehearse_recipe(recipe_path: Path, registry_dir: Path, start_from: str | None = None) -> Estimate:
    """Print what the run will take of memory and time, after a few of its steps. Trains and publishes nothing."""
    prepared = _prepare(recipe_path, registry_dir, start_from, say=lambda message: print(message, file=sys.stderr))
    from tune.estimate import describe, estimate

    found = estimate(prepared)
    print("\n".join(describe(found)))
    return found


def print_schema() -> None:
    """The JSON Schema of recipes, for editors and for clients that write them."""
    print(json.dumps(Recipe.model_json_schema(), indent=2))


def _recipe(path: Path, start_from: str | None) -> Recipe:
    recipe = load_recipe(path)
    if start_from is None:
        return recipe
    # Parsed again, as a whole: what is given here must fit the rest like what stands in the file.
    return parse_recipe(recipe.model_dump(mode="json", exclude_unset=True) | {"start_from": start_from})


def _prepare(recipe_path: Path, registry_dir: Path, start_from: str | None, *, say: Callable[[str], None]) -> Prepared:
    recipe = _recipe(recipe_path, start_from)
    prepare_environment()
    hush_optional_libraries()
    from tune.preparation import prepare

    class Speaker(SilentObserver):
        def on_event(self, event: TrainingEvent) -> None:
            say(event.message)

    return prepare(recipe, Registry(registry_dir), recipe_path.parent, Speaker())


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 published, 2 refused with a reason, 130 stopped and resumable."""
    parser = argparse.ArgumentParser(prog="python -m tune", description="Train a recipe and publish the result.")
    parser.add_argument("recipe", type=Path, help="YAML or JSON file; tune/recipe.py describes every field")
    parser.add_argument("--registry", type=Path, required=True, metavar="DIR", help="created when missing")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="default: runs/<name>; resumes what is there")
    parser.add_argument("--alias", help="alias to point to the result")
    parser.add_argument("--start-from", metavar="MODEL", help="adapter of the registry to go on from")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--explain", action="store_true", help="only print the recipe with every choice and its reason"
    )
    instead.add_argument("--dry-run", action="store_true", help="only estimate memory and time, from a few steps")
    given = parser.parse_args(arguments)
    try:
        if given.explain:
            explain_recipe(given.recipe, given.registry, given.start_from)
        elif given.dry_run:
            rehearse_recipe(given.recipe, given.registry, given.start_from)
        else:
            tune_recipe(given.recipe, given.registry, given.work_dir, given.alias, given.start_from)
    except StopRequested as stop:
        print(f"stopped ({stop.reason}); run the same command again to go on", file=sys.stderr)
        return _EXIT_STOPPED
    except CapoError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return _EXIT_INVALID
    return 0


def hush_optional_libraries() -> None:
    """peft imports these to ask whether they are in use; what they say about themselves would hide the bar."""
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _StopOnInterrupt:
    """Turns the first SIGINT or SIGTERM into a polite stop; a second one interrupts at once."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | signal.Handlers | None] = {}

    def reason(self) -> str | None:
        return self._reason

    def __enter__(self) -> _StopOnInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._reason is not None:
            raise KeyboardInterrupt
        self._reason = signal.Signals(number).name
        print("stopping after this step; once more to stop at once", file=sys.stderr)
