"""The stages of a run, one after another on the same weights, and how a stopped run goes on among them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tune.checkpoint import CheckpointFolder, Position, restore
from tune.epoch_checkpoints import EpochCheckpoints
from tune.export import load_adapter
from tune.model import Trainable, load_trainable
from tune.optimizers import make_optimizer
from tune.parallel import Ranks
from tune.preparation import Prepared
from tune.progress import Observer, TrainingEvent
from tune.sharding import bytes_held, gather, load_sharded
from tune.stages import ReadyStage
from tune.train import Best, Evaluation, StageState, evaluate, make_scaler, train_stage


@dataclass(frozen=True, slots=True)
class Trained:
    trainable: Trainable
    """In the first process the whole model, also where it was trained in parts."""
    position: Position
    checkpoints: CheckpointFolder


def train_stages(
    prepared: Prepared,
    work_dir: Path,
    watcher: Observer,
    should_stop: Callable[[], str | None],
    ranks: Ranks,
    epochs: EpochCheckpoints,
) -> Trained:
    """Run all stages, from the last resumable checkpoint in ``work_dir`` if there is one of this very run.

    Raises:
        StopRequested: ``should_stop`` gave a reason; a checkpoint was saved.
    """
    recipe = prepared.recipe
    assert recipe.dtype != "auto", recipe.dtype
    checkpoints = CheckpointFolder(work_dir / "checkpoints", prepared.fingerprint(), ranks)

    def load(device: torch.device) -> Trainable:
        assert recipe.dtype != "auto", recipe.dtype
        return load_trainable(
            prepared.base.path,
            recipe.method,
            dtype=recipe.dtype,
            device=device,
            seed=recipe.seed,
            gradient_checkpointing=any(stage.gradient_checkpointing for stage in recipe.stages),
        )

    if recipe.parallel == "sharded" and ranks.size > 1:
        trainable = load_sharded(load, recipe.method, prepared.device, ranks)
    else:
        trainable = load(prepared.device)
    if prepared.start is not None:
        load_adapter(trainable, prepared.start.path)
    counted = sum(parameter.numel() for _, parameter in trainable.parameters())
    watcher.on_event(TrainingEvent("info", f"{counted:,} trained parameters", {"trained_parameters": counted}))
    if ranks.size > 1:
        text = f"{ranks.size} processes, each with its share of every step; the batch stays what the recipe says"
        watcher.on_event(TrainingEvent("info", text, {"processes": ranks.size}))
    if trainable.is_sharded:
        held = bytes_held(trainable)
        text = f"the first of them holds {held.here:,} of the model's {held.whole:,} bytes; the others like it"
        watcher.on_event(TrainingEvent("info", text, {"parameter_bytes": held.here, "model_bytes": held.whole}))
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
            ranks.wait()  # until all have read it, because the first one removes it once it has published
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
        checkpoints.save(position, trainable, None)
    if trainable.is_sharded:
        trainable = gather(trainable, load, ranks)
    return Trained(trainable, position, checkpoints)


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
        checkpoints.save(_position_of(now, position, metrics), trainable, now.optimizer, now.scaler)

    def save_best(best: Best) -> None:
        if ready.stage.final_weights == "best":
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
        ranks.wait()  # until all have read them, because the next checkpoint removes them
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


def references_dir(work_dir: Path) -> Path:
    """Where the references of dpo stages are kept until the run is published."""
    return work_dir / "references"


def _reference_path(prepared: Prepared, stage_index: int, work_dir: Path) -> Path:
    return references_dir(work_dir) / f"{prepared.fingerprint()}-{stage_index:02d}.safetensors"


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
