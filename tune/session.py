"""One training run from recipe to published artifact, and how it resumes.

    registry = Registry(Path("registry-data"))
    result = run(load_recipe(path), registry=registry, work_dir=Path("runs/support"), recipe_dir=path.parent)
    print(result.artifact.revision)

Order: base -> data of all stages (faults surface before any training) -> stages -> rounding -> last validation
-> probes -> export -> publish. ``work_dir`` holds checkpoints and TensorBoard files; calling ``run``
again with the same recipe, data and directory goes on where the last call stopped.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from registry import Artifact, BaseModel, DataRecord, LoraShape, ManifestDraft, Registry, locate_base_model
from registry.errors import InvalidRequestError
from tune.checkpoint import CheckpointFolder, Position, restore
from tune.export import choose_save_dtype, export_adapter, export_model
from tune.model import (
    Trainable,
    choose_device,
    choose_dtype,
    context_tokens,
    load_tokenizer,
    load_trainable,
    round_weights,
    stop_token_ids,
)
from tune.observers import TensorBoardLog
from tune.probes import make_probes
from tune.progress import FanOut, Observer, SilentObserver, TrainingEvent
from tune.recipe import Recipe
from tune.stages import ReadyStage, prepare_stage
from tune.threads import choose_threads
from tune.train import Evaluation, StageState, evaluate, make_optimizer, train_stage

_RECORDED_LIBRARIES = ("capo-llm", "torch", "transformers", "tokenizers", "peft", "safetensors")


@dataclass(frozen=True, slots=True)
class TrainingResult:
    artifact: Artifact
    metrics: dict[str, float]
    """As in the manifest."""
    trained_tokens: int
    """Tokens that carried loss, over all stages and epochs."""
    steps: int
    """Optimizer steps over all stages."""


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
        work_dir: owned by this run alone while it runs; kept afterwards except for its checkpoints.
        observer: told about every step and event; not closed.
        should_stop: asked before each step; a text stops the run with a checkpoint.
        fine_tuned_name: write-once alias (``ft:...``) for the result.
        alias: set to the result; ``recipe.promote_alias`` means the same.
        recipe_dir: where relative paths of the recipe start; the current directory when not given.

    Raises:
        InvalidRequestError, InvalidDataError: recipe, base or data cannot work; data errors carry a line.
        ModelNotFoundError: there is no such base model.
        TrainingDivergedError: loss or gradient stopped being finite.
        StopRequested: ``should_stop`` gave a reason.
        StorageError: the disk refused.
    """
    if alias is not None and recipe.promote_alias is not None and alias != recipe.promote_alias:
        raise InvalidRequestError(
            f"alias={alias!r} and the recipe's promote_alias={recipe.promote_alias!r} differ; give one of them"
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    with TensorBoardLog(tensorboard_dir(work_dir)) as log:
        watcher = FanOut([observer or SilentObserver(), log])
        prepared = _prepare(recipe, registry, recipe_dir or Path(), watcher)
        trained = _train(prepared, work_dir, watcher, should_stop)
        artifact = _publish(
            prepared,
            trained,
            registry=registry,
            watcher=watcher,
            job_id=job_id,
            fine_tuned_name=fine_tuned_name,
            alias=alias or recipe.promote_alias,
        )
        watcher.on_event(TrainingEvent("info", f"published {artifact.revision}", {"revision": artifact.revision}))
    trained.checkpoints.clear()
    return TrainingResult(
        artifact=artifact,
        metrics=dict(artifact.manifest.metrics),
        trained_tokens=trained.position.trained_tokens,
        steps=trained.position.steps_done,
    )


@dataclass(frozen=True, slots=True)
class _Prepared:
    recipe: Recipe
    """With every open value filled in."""
    base: BaseModel
    tokenizer: Any
    stages: tuple[ReadyStage, ...]
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Trained:
    trainable: Trainable
    position: Position
    checkpoints: CheckpointFolder


def _prepare(recipe: Recipe, registry: Registry, recipe_dir: Path, watcher: Observer) -> _Prepared:
    """Choose everything and read all data, so that what can fail early does."""
    threads = choose_threads()
    torch.set_num_threads(threads.value)
    device = choose_device()
    dtype = choose_dtype(recipe.dtype, device)
    recipe = recipe.model_copy(update={"dtype": dtype.value})
    save_dtype = choose_save_dtype(recipe, dtype.value)
    base = _locate(recipe.base_model, registry, recipe_dir)
    for name, value, reason in (
        ("base_model", base.id, f"fingerprint {str(base.identity.fingerprint)[:16]}"),
        ("device", device.type, "the GPU if there is one"),
        ("threads", threads.value, threads.reason),
        ("dtype", dtype.value, dtype.reason),
        ("save_dtype", save_dtype.value, save_dtype.reason),
    ):
        watcher.on_event(TrainingEvent("info", f"{name} = {value} ({reason})"))
    tokenizer = load_tokenizer(base.path)
    context = context_tokens(base.path)
    stages = []
    for index in range(len(recipe.stages)):
        ready = prepare_stage(recipe, index, tokenizer=tokenizer, context_tokens=context, recipe_dir=recipe_dir)
        for note in ready.notes:
            watcher.on_event(note)
        stages.append(ready)
    resolved = recipe.model_copy(
        update={"save_dtype": save_dtype.value, "stages": tuple(ready.stage for ready in stages)}
    )
    return _Prepared(resolved, base, tokenizer, tuple(stages), device)


def _locate(reference: str, registry: Registry, recipe_dir: Path) -> BaseModel:
    """A directory beside the recipe wins over a name; everything else is the registry's to know."""
    beside = recipe_dir / reference
    return locate_base_model(str(beside) if beside.is_dir() else reference, registry)


def _train(prepared: _Prepared, work_dir: Path, watcher: Observer, should_stop: Callable[[], str | None]) -> _Trained:
    recipe = prepared.recipe
    assert recipe.dtype != "auto", recipe.dtype
    checkpoints = CheckpointFolder(work_dir / "checkpoints", _fingerprint(prepared))
    trainable = load_trainable(
        prepared.base.path,
        recipe.method,
        dtype=recipe.dtype,
        device=prepared.device,
        seed=recipe.seed,
        gradient_checkpointing=any(stage.gradient_checkpointing for stage in recipe.stages),
    )
    counted = sum(parameter.numel() for _, parameter in trainable.parameters())
    watcher.on_event(TrainingEvent("info", f"{counted:,} trained parameters", {"trained_parameters": counted}))
    position = Position(stage_index=0, step=0, trained_tokens=0, steps_done=0, metrics={})
    resume_from: Path | None = None
    latest = checkpoints.latest()
    if latest is not None:
        resume_from, position = latest
        where = f"stage {prepared.stages[position.stage_index].data.label} after step {position.step}"
        watcher.on_event(TrainingEvent("info", f"resuming at {where}", {"step": position.step}))
    elif checkpoints.has_foreign():
        checkpoints.clear()
        text = f"{work_dir} held a checkpoint of another recipe or other data; it was removed and training starts over"
        watcher.on_event(TrainingEvent("warn", text))
    for index in range(position.stage_index, len(prepared.stages)):
        position = _train_one(
            prepared,
            position,
            trainable,
            resume_from=resume_from,
            checkpoints=checkpoints,
            watcher=watcher,
            should_stop=should_stop,
        )
        resume_from = None
        if index + 1 < len(prepared.stages):
            checkpoints.save(position, trainable, None)
    return _Trained(trainable, position, checkpoints)


def _train_one(
    prepared: _Prepared,
    position: Position,
    trainable: Trainable,
    *,
    resume_from: Path | None,
    checkpoints: CheckpointFolder,
    watcher: Observer,
    should_stop: Callable[[], str | None],
) -> Position:
    """Run the stage at ``position`` to its end; the position at the start of the next one comes back."""
    ready = prepared.stages[position.stage_index]
    optimizer = make_optimizer(trainable, ready.stage, ready.learning_rate)
    state = StageState(optimizer, step=position.step, trained_tokens=position.trained_tokens)
    metrics = dict(position.metrics)
    if resume_from is not None:
        restore(resume_from, trainable, optimizer)
    if position.step == 0:
        torch.manual_seed(prepared.recipe.seed + position.stage_index)  # dropout
    if position.step == 0 and ready.data.validation:
        before = evaluate(trainable, ready.data.validation, micro_batch_size=_validation_batch(ready))
        metrics |= _figures(ready, before, "base_" if position.stage_index == 0 else "before_")
        text = f"stage {ready.data.label}: before training, valid_loss {before.loss:.4f}"
        watcher.on_event(TrainingEvent("info", text, {"valid_loss": before.loss}))

    def save(now: StageState) -> None:
        here = replace(position, step=now.step, trained_tokens=now.trained_tokens, metrics=metrics)
        checkpoints.save(here, trainable, now.optimizer)

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
        checkpoint_every_steps=prepared.recipe.checkpoint_every_steps,
    )
    seconds = time.perf_counter() - started
    text = f"stage {ready.data.label}: {state.step} steps, train_loss {state.last_train_loss:.4f}, {seconds:.1f} s"
    watcher.on_event(TrainingEvent("info", text))
    metrics[f"{ready.data.label}.train_loss"] = state.last_train_loss
    return Position(
        stage_index=position.stage_index + 1,
        step=0,
        trained_tokens=state.trained_tokens,
        steps_done=position.steps_done + state.step,
        metrics=metrics,
    )


def _publish(
    prepared: _Prepared,
    trained: _Trained,
    *,
    registry: Registry,
    watcher: Observer,
    job_id: str | None,
    fine_tuned_name: str | None,
    alias: str | None,
) -> Artifact:
    recipe, trainable = prepared.recipe, trained.trainable
    assert recipe.save_dtype != "auto", recipe.save_dtype
    round_weights(trainable, recipe.save_dtype)
    metrics = dict(trained.position.metrics)
    last = prepared.stages[-1]
    for ready in prepared.stages:
        if ready.data.validation:
            figures = evaluate(trainable, ready.data.validation, micro_batch_size=_validation_batch(ready))
            metrics |= _figures(ready, figures, "")
    metrics["trained_tokens"] = float(trained.position.trained_tokens)
    metrics["steps"] = float(trained.position.steps_done)
    probes = make_probes(
        trainable,
        last.data.validation or last.data.examples,
        stop_token_ids(trainable.model, prepared.tokenizer),
    )
    if not probes:
        watcher.on_event(
            TrainingEvent("warn", "no prompt has a clear greedy answer, so the artifact carries no probes")
        )
    with registry.stage() as directory:
        lora = _export(prepared, trainable, directory)
        draft = ManifestDraft(
            kind="lora" if lora is not None else "merged",
            name=recipe.name,
            base_model=prepared.base.identity,
            lora=lora,
            dtype=recipe.save_dtype,
            recipe=recipe.model_dump(mode="json"),
            data=_data_records(prepared.stages),
            seed=recipe.seed,
            library_versions=_library_versions(),
            job_id=job_id,
            parents=[prepared.base.id] if "@" in prepared.base.id else [],
            metrics=metrics,
            probes=probes,
        )
        return registry.publish(directory, draft, alias=alias, fine_tuned_name=fine_tuned_name)


def _export(prepared: _Prepared, trainable: Trainable, directory: Path) -> LoraShape | None:
    """Write the weights; the adapter's shape, or ``None`` for a whole model."""
    recipe = prepared.recipe
    assert recipe.save_dtype != "auto", recipe.save_dtype
    if recipe.method.kind == "lora":
        base_id = prepared.base.id
        return export_adapter(trainable, recipe.method, directory, base_id=base_id, save_dtype=recipe.save_dtype)
    export_model(trainable, prepared.base.path, directory, save_dtype=recipe.save_dtype)
    return None


def _figures(ready: ReadyStage, evaluation: Evaluation, prefix: str) -> dict[str, float]:
    return {
        f"{ready.data.label}.{prefix}valid_loss": evaluation.loss,
        f"{ready.data.label}.{prefix}valid_mean_token_accuracy": evaluation.mean_token_accuracy,
    }


def _validation_batch(ready: ReadyStage) -> int:
    assert ready.stage.micro_batch_size is not None, ready.stage
    return ready.stage.micro_batch_size


def _fingerprint(prepared: _Prepared) -> str:
    """Of everything that decides the run, apart from the machine."""
    files = [(str(account.path), account.sha256) for ready in prepared.stages for account in ready.accounts]
    decides = [prepared.recipe.model_dump(mode="json"), files, prepared.base.identity.fingerprint]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _data_records(stages: Sequence[ReadyStage]) -> list[DataRecord]:
    return [
        DataRecord(
            path=account.path.as_posix(),
            sha256=account.sha256,
            rows_used=account.rows_used,
            rows_truncated=account.rows_truncated,
            rows_dropped=account.rows_dropped,
        )
        for ready in stages
        for account in ready.accounts
    ]


def _library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _RECORDED_LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # capo-llm, when run from a source tree that is not installed
            continue
    return versions
