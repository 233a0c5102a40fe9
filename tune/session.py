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
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from registry import Artifact, Registry
from registry.durable import Filesystem
from registry.errors import InvalidRequestError, UnavailableError
from tune.checkpoint import CheckpointFolder, Position, restore
from tune.data.dataset import remove_stores
from tune.epoch_checkpoints import EpochCheckpoints
from tune.evaluation.after_training import make_exports, reviewer
from tune.evaluation.curves import CurveLog
from tune.export import load_adapter
from tune.model import Trainable, load_trainable
from tune.observers import TensorBoardLog
from tune.optimizers import make_optimizer
from tune.parallel import Ranks, joined_ranks
from tune.preparation import Prepared, prepare
from tune.progress import FanOut, Observer, SilentObserver, TrainingEvent
from tune.publication import publish
from tune.recipe import Recipe
from tune.stages import ReadyStage
from tune.trackers import open_tracker
from tune.train import Best, Evaluation, StageState, evaluate, make_scaler, train_stage


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
        trained = _train(prepared, work_dir, watcher, should_stop, ranks, epochs)
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
            shutil.rmtree(_references_dir(work_dir), ignore_errors=True)
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


@dataclass(frozen=True, slots=True)
class _Trained:
    trainable: Trainable
    position: Position
    checkpoints: CheckpointFolder


def _train(
    prepared: Prepared,
    work_dir: Path,
    watcher: Observer,
    should_stop: Callable[[], str | None],
    ranks: Ranks,
    epochs: EpochCheckpoints,
) -> _Trained:
    recipe = prepared.recipe
    assert recipe.dtype != "auto", recipe.dtype
    checkpoints = CheckpointFolder(work_dir / "checkpoints", prepared.fingerprint())
    trainable = load_trainable(
        prepared.base.path,
        recipe.method,
        dtype=recipe.dtype,
        device=prepared.device,
        seed=recipe.seed,
        gradient_checkpointing=any(stage.gradient_checkpointing for stage in recipe.stages),
    )
    if prepared.start is not None:
        load_adapter(trainable, prepared.start.path)
    counted = sum(parameter.numel() for _, parameter in trainable.parameters())
    watcher.on_event(TrainingEvent("info", f"{counted:,} trained parameters", {"trained_parameters": counted}))
    if ranks.size > 1:
        text = f"{ranks.size} processes, each with its share of every step; the batch stays what the recipe says"
        watcher.on_event(TrainingEvent("info", text, {"processes": ranks.size}))
    position = Position(stage_index=0, step=0, trained_tokens=0, steps_done=0, metrics={})
    resume_from: Path | None = None
    latest = checkpoints.latest()
    ranks.wait()  # all have looked before the first one writes
    if latest is not None:
        resume_from, position = latest
        for index in range(position.stage_index):
            _load_reference(prepared, index, work_dir)
        if position.stage_index < len(prepared.stages):
            where = f"at stage {prepared.stages[position.stage_index].data.label} after step {position.step}"
        else:
            restore(resume_from, trainable, None)
            where = "after the last step"
        watcher.on_event(TrainingEvent("info", f"resuming {where}", {"step": position.step}))
    elif ranks.is_first and checkpoints.has_unusable():
        checkpoints.clear()
        text = f"{work_dir} held a checkpoint of another recipe or other data, or a damaged one; it was removed"
        watcher.on_event(TrainingEvent("warn", f"{text} and training starts over"))
    while position.stage_index < len(prepared.stages):
        position = _train_one(
            prepared,
            position,
            trainable,
            work_dir=work_dir,
            resume_from=resume_from,
            checkpoints=checkpoints,
            watcher=watcher,
            should_stop=should_stop,
            ranks=ranks,
            epochs=epochs,
        )
        resume_from = None
        if ranks.is_first:
            checkpoints.save(position, trainable, None)
    return _Trained(trainable, position, checkpoints)


def _train_one(
    prepared: Prepared,
    position: Position,
    trainable: Trainable,
    *,
    work_dir: Path,
    resume_from: Path | None,
    checkpoints: CheckpointFolder,
    watcher: Observer,
    should_stop: Callable[[], str | None],
    ranks: Ranks,
    epochs: EpochCheckpoints,
) -> Position:
    """Run the stage at ``position`` to its end; the position at the start of the next one comes back."""
    ready = prepared.stages[position.stage_index]
    state = _state_at(position, make_optimizer(trainable, ready.stage, ready.learning_rate), trainable)
    metrics = dict(position.metrics)
    if resume_from is not None:
        restore(resume_from, trainable, state.optimizer, state.scaler)
    if position.step > 0:
        _load_reference(prepared, position.stage_index, work_dir)
    elif ready.reference is not None:
        for pairs in (ready.data.examples, ready.data.validation):
            ready.reference.measure(trainable, pairs, ready.micro_batch_size)
        if ranks.is_first:
            ready.reference.keep(_reference_path(prepared, position.stage_index, work_dir))
    if position.step == 0 and ready.data.validation:
        before = _validate(ready, trainable, ranks)
        is_base = position.stage_index == 0 and prepared.start is None
        metrics |= before.named(ready.data.label, prefix="base_" if is_base else "before_")
        text = f"stage {ready.data.label}: before training, valid_loss {before.loss:.4f}"
        watcher.on_event(TrainingEvent("info", text, {"valid_loss": before.loss}))

    def save(now: StageState) -> None:
        if ranks.is_first:
            checkpoints.save(_position_of(now, position, metrics), trainable, now.optimizer, now.scaler)

    def save_best(best: Best) -> None:
        if ranks.is_first and ready.stage.final_weights == "best":
            checkpoints.save_best(position.stage_index, best.step, trainable)

    started = time.perf_counter()
    train_stage(
        trainable,
        ready.stage,
        ready.data,
        state,
        learning_rate=ready.learning_rate,
        observer=watcher,
        should_stop=should_stop,
        save_checkpoint=save,
        save_best=save_best,
        end_epoch=lambda now: epochs.end_epoch(trainable, position.stage_index, now, steps_before=position.steps_done),
        checkpoint_every_steps=prepared.recipe.checkpoint_every_steps,
        ranks=ranks,
        steps_before=position.steps_done,
        steps_after=sum(len(later.data.steps) for later in prepared.stages[position.stage_index + 1 :]),
    )
    seconds = time.perf_counter() - started
    text = f"stage {ready.data.label}: {state.step} steps, train_loss {state.last_train_loss:.4f}, {seconds:.1f} s"
    watcher.on_event(TrainingEvent("info", text))
    metrics[f"{ready.data.label}.train_loss"] = state.last_train_loss
    metrics[f"{ready.data.label}.train_mean_token_accuracy"] = state.last_train_accuracy
    if state.micro_batch_size != ready.stage.micro_batch_size:
        metrics[f"{ready.data.label}.micro_batch_size_after_out_of_memory"] = float(state.micro_batch_size or 0)
    if ready.stage.final_weights == "best" and state.best is not None:
        ranks.wait()  # until the first one has written them
        checkpoints.restore_best(position.stage_index, state.best.step, trainable)
        metrics[f"{ready.data.label}.best_step"] = float(state.best.step)
        text = f"stage {ready.data.label}: took the weights of step {state.best.step}, the best validation"
        watcher.on_event(TrainingEvent("info", text, {"step": state.best.step, "valid_loss": state.best.valid_loss}))
    return Position(
        stage_index=position.stage_index + 1,
        step=0,
        trained_tokens=state.trained_tokens,
        processed_tokens=state.processed_tokens,
        steps_done=position.steps_done + state.step,
        metrics=metrics,
    )


def _references_dir(work_dir: Path) -> Path:
    return work_dir / "references"


def _reference_path(prepared: Prepared, stage_index: int, work_dir: Path) -> Path:
    return _references_dir(work_dir) / f"{prepared.fingerprint()}-{stage_index:02d}.safetensors"


def _load_reference(prepared: Prepared, stage_index: int, work_dir: Path) -> None:
    reference = prepared.stages[stage_index].reference
    if reference is not None:
        reference.load(_reference_path(prepared, stage_index, work_dir))


def _validate(ready: ReadyStage, trainable: Trainable, ranks: Ranks) -> Evaluation:
    return evaluate(
        trainable,
        ready.data.validation,
        micro_batch_size=ready.micro_batch_size,
        make_objective=ready.data.make_objective,
        ranks=ranks,
    )


def _state_at(position: Position, optimizer: torch.optim.Optimizer, trainable: Trainable) -> StageState:
    best = None
    if position.best_step is not None and position.best_valid_loss is not None:
        best = Best(position.best_step, position.best_valid_loss)
    return StageState(
        optimizer,
        step=position.step,
        trained_tokens=position.trained_tokens,
        processed_tokens=position.processed_tokens,
        best=best,
        validations_without_gain=position.validations_without_gain,
        micro_batch_size=position.micro_batch_size,
        scaler=make_scaler(trainable),
    )


def _position_of(state: StageState, began: Position, metrics: dict[str, float]) -> Position:
    return replace(
        began,
        step=state.step,
        trained_tokens=state.trained_tokens,
        processed_tokens=state.processed_tokens,
        metrics=metrics,
        best_step=state.best.step if state.best is not None else None,
        best_valid_loss=state.best.valid_loss if state.best is not None else None,
        validations_without_gain=state.validations_without_gain,
        micro_batch_size=state.micro_batch_size,
    )
