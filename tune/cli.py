"""Training from the command line: ``python -m tune RECIPE.yaml --registry DIR [--work-dir DIR]``.

``capo tune`` calls :func:`tune_recipe` too. torch is imported only after the thread settings are in place.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from registry import Registry
from registry.errors import CapoError
from tune.observers import ProgressBar
from tune.progress import StopRequested
from tune.recipe import load_recipe
from tune.threads import prepare_environment

if TYPE_CHECKING:
    from tune.session import TrainingResult

_EXIT_INVALID = 2
_EXIT_STOPPED = 130


def tune_recipe(
    recipe_path: Path, registry_dir: Path, work_dir: Path | None = None, alias: str | None = None
) -> TrainingResult:
    """Train a recipe with a progress bar on stderr. The first Ctrl-C stops at the next step with a checkpoint.

    ``work_dir`` is ``runs/<name>`` when not given; the same directory resumes a stopped run.
    """
    recipe = load_recipe(recipe_path)
    prepare_environment()
    _hush_optional_libraries()
    from tune.session import (
        run,
        tensorboard_dir,
    )  # torch and transformers: seconds, and after the environment

    work_dir = work_dir or Path("runs") / recipe.name
    stop = _StopOnInterrupt()
    with stop, ProgressBar() as bar:
        result = run(
            recipe,
            registry=Registry(registry_dir),
            work_dir=work_dir,
            observer=bar,
            should_stop=stop.reason,
            alias=alias,
            recipe_dir=recipe_path.parent,
        )
    print(result.artifact.revision)
    print(f"TensorBoard: tensorboard --logdir {tensorboard_dir(work_dir)}", file=sys.stderr)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 published, 2 refused with a reason, 130 stopped and resumable."""
    parser = argparse.ArgumentParser(prog="python -m tune", description="Train a recipe and publish the result.")
    parser.add_argument("recipe", type=Path, help="YAML file; tune/recipe.py describes every field")
    parser.add_argument("--registry", type=Path, required=True, metavar="DIR", help="created when missing")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="default: runs/<name>; resumes what is there")
    parser.add_argument("--alias", help="alias to point to the result")
    given = parser.parse_args(arguments)
    try:
        tune_recipe(given.recipe, given.registry, given.work_dir, given.alias)
    except StopRequested as stop:
        print(f"stopped ({stop.reason}); run the same command again to go on", file=sys.stderr)
        return _EXIT_STOPPED
    except CapoError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return _EXIT_INVALID
    return 0


def _hush_optional_libraries() -> None:
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
