"""Stand-ins for :func:`tune.session.run`: each behaves in one way, good or bad, and publishes for real.

They are module-level functions because a worker process gets them by name.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import Artifact, BaseModelIdentity, LoraShape, ManifestDraft, Registry
from registry.durable import Filesystem
from registry.errors import InvalidDataError, StorageError, UnavailableError
from tune.progress import Observer, StepMetrics, StopRequested, TrainingEvent
from tune.recipe import Recipe

STEPS = 3
TOKENS = 120.0


@dataclass(frozen=True)
class Trained:
    artifact: Artifact
    trained_tokens: int


def trains_well(
    recipe: Recipe,
    *,
    registry: Registry,
    work_dir: Path,
    observer: Observer,
    should_stop: Callable[[], str | None],
    job_id: str | None,
    fine_tuned_name: str | None,
    alias: str | None,
    recipe_dir: Path,
) -> Trained:
    """Also holds the worker to its word that the recipe's data lies below ``recipe_dir``."""
    _note(registry, job_id)
    assert all((recipe_dir / source.path).is_file() for stage in recipe.stages for source in stage.data)
    observer.on_event(TrainingEvent("info", "data read"))
    for step in range(1, STEPS + 1):
        if (reason := should_stop()) is not None:
            raise StopRequested(reason)
        observer.on_step(step_metrics(step))
    return publish(recipe, registry, work_dir, job_id=job_id, name=fine_tuned_name, alias=alias)


def finds_bad_data(recipe: Recipe, *, registry: Registry, job_id: str | None, **_: object) -> Trained:
    _note(registry, job_id)
    raise InvalidDataError("line 4: every token is masked", line=4)


def has_a_bug(recipe: Recipe, *, registry: Registry, job_id: str | None, **_: object) -> Trained:
    _note(registry, job_id)
    raise ZeroDivisionError("secret detail")


def meets_a_full_disk(recipe: Recipe, *, registry: Registry, job_id: str | None, **_: object) -> Trained:
    _note(registry, job_id)
    raise StorageError("the disk is full")


def exits(recipe: Recipe, *, registry: Registry, job_id: str | None, **_: object) -> Trained:
    _note(registry, job_id)
    os._exit(9)


def is_killed(recipe: Recipe, *, registry: Registry, job_id: str | None, **_: object) -> Trained:
    _note(registry, job_id)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def is_killed_once(
    recipe: Recipe,
    *,
    registry: Registry,
    work_dir: Path,
    observer: Observer,
    should_stop: Callable[[], str | None],
    job_id: str | None,
    fine_tuned_name: str | None,
    alias: str | None,
    recipe_dir: Path,
) -> Trained:
    """Leaves a mark where checkpoints would be, so that the next attempt "resumes" and succeeds."""
    mark = work_dir / "checkpoint"
    if not mark.exists():
        _note(registry, job_id)
        mark.touch()
        observer.on_step(step_metrics(1))
        os.kill(os.getpid(), signal.SIGKILL)
    return trains_well(
        recipe,
        registry=registry,
        work_dir=work_dir,
        observer=observer,
        should_stop=should_stop,
        job_id=job_id,
        fine_tuned_name=fine_tuned_name,
        alias=alias,
        recipe_dir=recipe_dir,
    )


def is_killed_after_publishing(
    recipe: Recipe,
    *,
    registry: Registry,
    work_dir: Path,
    job_id: str | None,
    fine_tuned_name: str | None,
    alias: str | None,
    **_: object,
) -> Trained:
    _note(registry, job_id)
    publish(recipe, registry, work_dir, job_id=job_id, name=fine_tuned_name, alias=alias)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def hangs(recipe: Recipe, *, registry: Registry, job_id: str | None, **_: object) -> Trained:
    """Deaf to everything but SIGKILL."""
    _note(registry, job_id)
    while True:
        time.sleep(60)


def publishes_then_hangs(
    recipe: Recipe,
    *,
    registry: Registry,
    work_dir: Path,
    job_id: str | None,
    fine_tuned_name: str | None,
    alias: str | None,
    **_: object,
) -> Trained:
    publish(recipe, registry, work_dir, job_id=job_id, name=fine_tuned_name, alias=alias)
    _note(registry, job_id)
    while True:
        time.sleep(60)


def makes_one_export_then_hangs(recipe: Recipe, *, registry: Registry, **rest: Any) -> Trained:
    """Publishes, makes the first of the exports that it is asked for, and is deaf to everything but SIGKILL."""
    made = publish(
        recipe, registry, rest["work_dir"], job_id=rest["job_id"], name=rest["fine_tuned_name"], alias=rest["alias"]
    )
    with registry.stage() as directory:
        (directory / "weights.txt").write_text(str(rest["job_id"]))
        draft = ManifestDraft(
            kind="merged",
            name=f"{recipe.name}-merged",
            base_model=BaseModelIdentity(id=recipe.base_model),
            parents=[made.artifact.revision],
            dtype="float32",
            metrics={},
        )
        registry.publish(directory, draft)
    _note(registry, rest["job_id"])
    while True:
        time.sleep(60)


def takes_long(
    recipe: Recipe,
    *,
    registry: Registry,
    work_dir: Path,
    observer: Observer,
    should_stop: Callable[[], str | None],
    job_id: str | None,
    **_: object,
) -> Trained:
    """Steps until it is asked to stop, and then leaves a checkpoint."""
    _note(registry, job_id)
    step = 0
    while (reason := should_stop()) is None:
        step += 1
        observer.on_step(step_metrics(step, total=1_000_000))
        time.sleep(0.02)
    (work_dir / "checkpoint").touch()
    raise StopRequested(reason)


def takes_a_long_step(
    recipe: Recipe,
    *,
    registry: Registry,
    work_dir: Path,
    should_stop: Callable[[], str | None],
    job_id: str | None,
    **_: object,
) -> Trained:
    """As a large model: hears that it should stop only after a step of 1.5 s, and then leaves a checkpoint."""
    _note(registry, job_id)
    while (reason := should_stop()) is None:
        time.sleep(1.5)
    (work_dir / "checkpoint").touch()
    raise StopRequested(reason)


def holds_its_directory(
    recipe: Recipe,
    *,
    registry: Registry,
    work_dir: Path,
    observer: Observer,
    should_stop: Callable[[], str | None],
    job_id: str | None,
    fine_tuned_name: str | None,
    alias: str | None,
    recipe_dir: Path,
) -> Trained:
    """As real training, which two processes never do in one directory: the first one goes on for ever."""
    lock = Filesystem().lock(work_dir / "run.lock", wait_seconds=0.0)
    if lock is None:
        raise UnavailableError("another run works here", code="work_dir_busy")
    _note(registry, job_id)
    is_first = not (work_dir / "mark").exists()
    (work_dir / "mark").touch()
    while is_first and should_stop() is None:
        time.sleep(0.02)
    return publish(recipe, registry, work_dir, job_id=job_id, name=fine_tuned_name, alias=alias)


def finds_its_directory_busy(recipe: Recipe, *, registry: Registry, job_id: str | None, **_: object) -> Trained:
    _note(registry, job_id)
    raise UnavailableError("another run works here", code="work_dir_busy")


def trains_in_ranks(recipe: Recipe, *, registry: Registry, work_dir: Path, job_id: str | None, **rest: Any) -> Trained:
    """Each process leaves its part of the environment and what all come to when they add up; the first one waits for
    all, the others for their end."""
    import torch  # seconds, which the other stand-ins need not wait for

    from tune.parallel import joined_ranks

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    told: dict[str, Any] = {name: os.environ.get(name) for name in names} | {"pid": os.getpid()}
    with joined_ranks() as ranks:
        number = torch.tensor([1 + ranks.rank])
        ranks.add_up(number)
        told["sum"] = int(number)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    (registry.root.parent / f"rank-{rank}.part").write_text(json.dumps(told))
    (registry.root.parent / f"rank-{rank}.part").rename(registry.root.parent / f"rank-{rank}.json")
    while rank > 0:
        time.sleep(60)
    while len(list(registry.root.parent.glob("rank-*.json"))) < size:
        time.sleep(0.01)
    return trains_well(recipe, registry=registry, work_dir=work_dir, job_id=job_id, **rest)


def loses_a_rank(recipe: Recipe, **_: object) -> Trained:
    """The second process ends in the middle of a step, for which the first would wait for ever."""
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(60)
    raise AssertionError("the first process was not ended")


def attempts(directory: Path) -> list[str]:
    """Job ids in the order in which stand-ins began to work on them."""
    notes = directory / "attempts.txt"
    return notes.read_text().split() if notes.exists() else []


def step_metrics(step: int, *, total: int = STEPS) -> StepMetrics:
    is_last = step == total
    return StepMetrics(
        stage="1-sft",
        step=step,
        total_steps=total,
        train_loss=2.0 / step,
        train_mean_token_accuracy=0.5,
        valid_loss=1.5 if is_last else None,
        valid_mean_token_accuracy=0.6 if is_last else None,
        learning_rate=1e-4,
        grad_norm=float("nan") if step == 1 else 1.0,
        trained_tokens=40 * step,
        processed_tokens=100 * step,
        tokens_per_second=1000.0,
        seconds_left=float(total - step),
    )


def publish(
    recipe: Recipe,
    registry: Registry,
    work_dir: Path,
    *,
    job_id: str | None,
    name: str | None,
    alias: str | None,
) -> Trained:
    export = work_dir / "export"
    export.mkdir(exist_ok=True)
    (export / "weights.txt").write_text(f"{job_id} {os.getpid()}")
    draft = ManifestDraft(
        kind="lora",
        name=recipe.name,
        base_model=BaseModelIdentity(id=recipe.base_model),
        lora=LoraShape(rank=8, alpha=16.0, target_modules=["q_proj"]),
        dtype="float32",
        job_id=job_id,
        metrics={"trained_tokens": TOKENS},
    )
    artifact = registry.publish(export, draft, alias=alias, fine_tuned_name=name)
    return Trained(artifact, int(TOKENS))


def _note(registry: Registry, job_id: str | None) -> None:
    """One atomic append: several processes write here."""
    descriptor = os.open(registry.root.parent / "attempts.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, f"{job_id}\n".encode())
    finally:
        os.close(descriptor)
