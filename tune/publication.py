"""From trained weights to an artifact: round, measure, probe, export, publish."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from safetensors import SafetensorError

from registry import Artifact, DataRecord, LoraShape, ManifestDraft, Registry
from registry.errors import StorageError
from tune.export import export_adapter, export_model
from tune.model import Trainable, round_weights
from tune.preparation import Prepared
from tune.probes import make_probes
from tune.progress import Observer, TrainingEvent
from tune.stages import ReadyStage
from tune.train import evaluate

_RECORDED_LIBRARIES = ("capo-llm", "torch", "transformers", "tokenizers", "peft", "safetensors")


def publish(
    prepared: Prepared,
    trainable: Trainable,
    metrics: dict[str, float],
    *,
    registry: Registry,
    watcher: Observer,
    job_id: str | None,
    fine_tuned_name: str | None,
    alias: str | None,
) -> Artifact:
    """Publish what was trained. Rounds the weights in place and, for a whole model, uses the model up.

    ``metrics`` were measured so far; the validation figures of the stored weights join them in the manifest.
    """
    recipe = prepared.recipe
    assert recipe.save_dtype != "auto", recipe.save_dtype
    round_weights(trainable, recipe.save_dtype)
    metrics = dict(metrics)
    for ready in prepared.stages:
        if ready.data.validation:
            figures = evaluate(trainable, ready.data.validation, micro_batch_size=ready.micro_batch_size)
            metrics |= figures.named(ready.data.label)
    last = prepared.stages[-1].data
    probes = make_probes(trainable, last.validation or last.examples, prepared.stop_ids)
    if not probes:
        text = "no prompt has a clear greedy answer, so the artifact carries no probes"
        watcher.on_event(TrainingEvent("warn", text))
    with registry.stage() as directory:
        try:
            lora = _export(prepared, trainable, directory)
        except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
            raise StorageError(f"cannot write the trained weights: {error}; free some space and resume") from error
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


def _export(prepared: Prepared, trainable: Trainable, directory: Path) -> LoraShape | None:
    """Write the weights; the adapter's shape, or ``None`` for a whole model."""
    recipe = prepared.recipe
    assert recipe.save_dtype != "auto", recipe.save_dtype
    if recipe.method.kind == "lora":
        base_id = prepared.base.id
        return export_adapter(trainable, recipe.method, directory, base_id=base_id, save_dtype=recipe.save_dtype)
    export_model(trainable, prepared.base.path, directory, save_dtype=recipe.save_dtype)
    return None


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
