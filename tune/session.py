"""One training run from recipe to published artifact, and how it resumes.

    registry = Registry(Path("registry-data"))
    result = run(load_recipe(path), registry=registry, work_dir=Path("runs/support"), recipe_dir=path.parent)
    print(result.artifact.revision)

Order: base -> data of all stages (faults surface before any training) -> stages -> rounding -> last validation
-> probes -> export -> publish. ``work_dir`` holds checkpoints and TensorBoard files; calling ``run``
again with the same recipe, data and directory goes on where the last call stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from registry import Artifact, Registry
from registry.durable import Filesystem
from registry.errors import InvalidRequestError, UnavailableError
from tune.data.dataset import remove_stores
from tune.epoch_checkpoints import EpochCheckpoints
from tune.evaluation.after_training import make_exports, reviewer
from tune.evaluation.curves import CurveLog
from tune.evaluation.libraries import import_libraries, libraries_of
from tune.observers import TensorBoardLog
from tune.parallel import joined_ranks
from tune.preparation import prepare
from tune.progress import FanOut, Observer, SilentObserver, TrainingEvent
from tune.publication import publish
from tune.recipe import Recipe
from tune.stage_runs import references_dir, train_stages
from tune.trackers import open_tracker


@dataclass(frozen=True, slots=True)
class TrainingResult:
    artifact: Artifact
    metrics: dict[str, float]
    """As in the manifest."""
    trained_tokens: int
    """Tokens that carried loss, over all stages and epochs."""
    processed_tokens: int
    """Tokens that went through the model in training, over all stages and epochs."""
    steps: int
    """Optimizer steps over all stages."""


_RUN_ID_DIGITS = 16
"""Of the fingerprint, in trackers."""


def tensorboard_dir(work_dir: Path) -> Path:
    """Where a run in ``work_dir`` writes its TensorBoard files."""
    return work_dir / "tensorboard"


def run(
    recipe: Recipe,
    *,
    registry: Registry,
    work_dir: Path,
    observer: Observer | None = None,
    should_stop: Callable[[], str | None] = lambda: None,
    job_id: str | None = None,
    fine_tuned_name: str | None = None,
    alias: str | None = None,
    recipe_dir: Path | None = None,
) -> TrainingResult:
    """Train and publish. Blocks until done; the calling thread does the work.

    Args:
        work_dir: owned by this run alone while it runs; kept afterwards except for checkpoints and tokenised rows.
        observer: told about every step and event; not closed.
        should_stop: asked before each step; a text stops the run with a checkpoint.
        fine_tuned_name: write-once alias (``ft:...``) for the result; the adapters of earlier epochs' ends are
            published too then (:mod:`tune.epoch_checkpoints`).
        alias: set to the result; ``recipe.promote_alias`` means the same.
        recipe_dir: where relative paths of the recipe start; the current directory when not given.

    Raises:
        InvalidRequestError, InvalidDataError: recipe, base or data cannot work; data errors carry a line.
        ModelNotFoundError: there is no such base model.
        TrainingDivergedError: loss or gradient stopped being finite.
        StopRequested: ``should_stop`` gave a reason.
        StorageError: the disk refused.
        UnavailableError: another run works in ``work_dir``.
    """
    if alias is not None and recipe.promote_alias is not None and alias != recipe.promote_alias:
        raise InvalidRequestError(
            f"alias={alias!r} and the recipe's promote_alias={recipe.promote_alias!r} differ; give one of them"
        )
    if recipe.promote_if is not None and alias is None and recipe.promote_alias is None:
        raise InvalidRequestError(
            f"promote_if={recipe.promote_if!r} decides whether an alias moves, and none is given; set promote_alias",
            param="promote_if",
        )
    if recipe.evaluation is not None:
        import_libraries(libraries_of(recipe.evaluation))  # what judges the result must be here before there is one
    with joined_ranks() as ranks, ExitStack() as stack:
        if ranks.is_first:
            work_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_sole_user_of(work_dir))
            log = stack.enter_context(TensorBoardLog(tensorboard_dir(work_dir)))
            observers = [observer or SilentObserver(), log]
        else:
            observers = []
        ranks.wait()
        if not ranks.is_first:
            ranks.wait()  # the first one tokenises; the others then find the rows in the store
        prepared = prepare(recipe, registry, recipe_dir or Path(), FanOut(observers), work_dir / "data")
        if ranks.is_first:
            ranks.wait()
        curve = CurveLog(work_dir / f"curve-{prepared.fingerprint()[:_RUN_ID_DIGITS]}.jsonl")
        review = None
        if ranks.is_first:
            observers.append(curve)
            review = reviewer(prepared, recipe_dir or Path(), curve, FanOut(observers))
            for name in recipe.trackers:
                tracker = open_tracker(
                    name,
                    run_name=recipe.name,
                    run_id=prepared.fingerprint()[:_RUN_ID_DIGITS],
                    recipe=prepared.recipe.model_dump(mode="json"),
                    wandb=recipe.wandb,
                )
                stack.push(tracker)
                observers.append(tracker)
        watcher = FanOut(observers)
        epochs = EpochCheckpoints(
            prepared,
            registry=registry,
            watcher=watcher,
            job_id=job_id,
            fine_tuned_name=fine_tuned_name,
            ranks=ranks,
        )
        trained = train_stages(prepared, work_dir, watcher, should_stop, ranks, epochs)
        totals = {
            "trained_tokens": float(trained.position.trained_tokens),
            "processed_tokens": float(trained.position.processed_tokens),
            "steps": float(trained.position.steps_done),
        }
        revision = ""
        if ranks.is_first:
            revision = publish(
                prepared,
                trained.trainable,
                trained.position.metrics | totals,
                registry=registry,
                watcher=watcher,
                job_id=job_id,
                fine_tuned_name=fine_tuned_name,
                alias=alias or recipe.promote_alias,
                review=review,
            ).revision
            watcher.on_event(TrainingEvent("info", f"published {revision}", {"revision": revision}))
            make_exports(prepared, registry.resolve(revision), registry, watcher)
            trained.checkpoints.clear()
            shutil.rmtree(references_dir(work_dir), ignore_errors=True)
            remove_stores(work_dir / "data")
        artifact = registry.resolve(ranks.text_of_first(revision))
    return TrainingResult(
        artifact=artifact,
        metrics=dict(artifact.manifest.metrics),
        trained_tokens=trained.position.trained_tokens,
        processed_tokens=trained.position.processed_tokens,
        steps=trained.position.steps_done,
    )


@contextmanager
def _sole_user_of(work_dir: Path) -> Iterator[None]:
    """Two runs that wrote checkpoints into one directory would destroy each other's."""
    lock = Filesystem().lock(work_dir / "run.lock", wait_seconds=0.0)
    if lock is None:
        raise UnavailableError(
            f"another run works in {work_dir}; wait for it, or give another work_dir", code="work_dir_busy"
        )
    try:
        yield
    finally:
        lock.release()
