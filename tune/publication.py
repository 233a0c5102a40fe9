"""From trained weights to an artifact: deliver, measure, probe, export, publish."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from registry import Artifact, DataRecord, LoraShape, ManifestDraft, Probe, Registry
from registry.errors import ConflictError, StorageError
from tune.data.mask import Example
from tune.data.pairs import PreferenceExample
from tune.delivery import Delivery, deliver
from tune.evaluation.after_training import Review
from tune.export import export_adapter, export_model
from tune.methods import QloraMethod
from tune.model import Trainable, as_stored
from tune.preparation import Prepared
from tune.probes import make_probes
from tune.progress import Observer, TrainingEvent
from tune.stages import ReadyStage
from tune.train import evaluate

_PROBE_EXAMPLES = 10_000
"""Probes are the shortest prompts among this many examples."""
_RECORDED_LIBRARIES = ("capo-llm", "torch", "transformers", "tokenizers", "peft", "bitsandbytes", "safetensors")


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
    review: Review | None = None,
) -> Artifact:
    """Publish what was trained, in the form that can be served; uses ``trainable`` up.

    ``metrics`` were measured so far; the validation figures of the stored weights join them in the manifest, and so
    do those of ``review``, which decides whether ``alias`` moves.
    """
    recipe = prepared.recipe
    assert recipe.save_dtype != "auto", recipe.save_dtype
    metrics = dict(metrics)
    last = prepared.stages[-1].data
    examples = _single_examples(last.validation or last.examples)
    if isinstance(recipe.method, QloraMethod):
        metrics |= _validate(prepared.stages, trainable, prefix="quantized_")
    delivery = deliver(trainable, recipe.method, prepared.base.path, save_dtype=recipe.save_dtype, compare_on=examples)
    for text in delivery.notes:
        watcher.on_event(TrainingEvent("info", text))
    metrics |= delivery.metrics | _validate(prepared.stages, delivery.served)
    probes = make_probes(delivery.served, examples, prepared.stop_ids)
    if not probes:
        text = "no prompt has a clear greedy answer, so the artifact carries no probes"
        watcher.on_event(TrainingEvent("warn", text))
    with registry.stage() as directory:
        try:
            lora = _export(prepared, delivery, directory)
        except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
            raise StorageError(f"cannot write the trained weights: {error}; free some space and resume") from error
        if review is not None:
            outcome = review(directory, lora is not None)
            metrics |= outcome.metrics()
            alias = alias if outcome.is_promoted else None
        draft = _draft(prepared, lora, job_id=job_id, metrics=metrics, probes=probes)
        return registry.publish(directory, draft, alias=alias, fine_tuned_name=fine_tuned_name)


def publish_checkpoint(
    prepared: Prepared,
    trainable: Trainable,
    metrics: dict[str, float],
    *,
    registry: Registry,
    job_id: str | None,
    name: str,
) -> Artifact:
    """Publish the adapter as it is now under the ``ft:`` name ``name``; the run goes on as if nothing had happened.

    ``metrics`` are those of the weights as they are stored. A run that repeats its steps after a crash publishes the
    same bytes and gets the artifact that is there. Where a machine does not repeat them bit for bit, the first one
    stays. Of a base in 4 bits it carries no probes, as they would have to be made on the original one; of a sharded one
    neither, as this process cannot run it alone.
    """
    recipe = prepared.recipe
    assert recipe.save_dtype != "auto", recipe.save_dtype
    probes: list[Probe] = []
    with registry.stage() as directory, as_stored(trainable, recipe.save_dtype):
        if not (isinstance(recipe.method, QloraMethod) or trainable.is_sharded):
            last = prepared.stages[-1].data
            examples = _single_examples(last.validation or last.examples)
            probes = make_probes(trainable, examples, prepared.stop_ids)
        try:
            lora = export_adapter(trainable, directory, base_id=prepared.base.id, save_dtype=recipe.save_dtype)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write the checkpoint's adapter: {error}; free some space and resume") from error
        draft = _draft(prepared, lora, job_id=job_id, metrics=metrics, probes=probes)
        try:
            return registry.publish(directory, draft, fine_tuned_name=name)
        except ConflictError as error:
            if error.code != "alias_is_write_once":
                raise
            return registry.resolve(name)


def _draft(
    prepared: Prepared, lora: LoraShape | None, *, job_id: str | None, metrics: dict[str, float], probes: list[Probe]
) -> ManifestDraft:
    recipe = prepared.recipe
    parents = [prepared.base.id] if "@" in prepared.base.id else []
    return ManifestDraft(
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
        parents=parents if prepared.start is None else [*parents, prepared.start.revision],
        metrics=metrics,
        probes=probes,
    )


def _validate(stages: Sequence[ReadyStage], trainable: Trainable, prefix: str = "") -> dict[str, float]:
    metrics: dict[str, float] = {}
    for ready in stages:
        if ready.data.validation:
            figures = evaluate(
                trainable,
                ready.data.validation,
                micro_batch_size=ready.micro_batch_size,
                make_objective=ready.data.make_objective,
            )
            metrics |= figures.named(ready.data.label, prefix)
    return metrics


def _single_examples(examples: Sequence[Any]) -> Sequence[Example]:
    """At most 10,000; of pairs, the preferred answers."""
    few: Sequence[Any] = examples[:_PROBE_EXAMPLES]
    return [pair.chosen if isinstance(pair, PreferenceExample) else pair for pair in few]


def _export(prepared: Prepared, delivery: Delivery, directory: Path) -> LoraShape | None:
    """Write the weights; the adapter's shape, or ``None`` for a whole model."""
    save_dtype = prepared.recipe.save_dtype
    assert save_dtype != "auto", save_dtype
    if delivery.is_adapter:
        return export_adapter(delivery.served, directory, base_id=prepared.base.id, save_dtype=save_dtype)
    export_model(delivery.served, prepared.base.path, directory, save_dtype=save_dtype)
    return None


def _data_records(stages: Sequence[ReadyStage]) -> list[DataRecord]:
    return [
        DataRecord(
            path=account.path.as_posix(),
            sha256=account.sha256,
            format=account.format,
            rows_used=account.rows_used,
            rows_held_out=account.rows_held_out,
            rows_truncated=account.rows_truncated,
            rows_redacted=account.rows_redacted,
            rows_dropped=account.rows_dropped,
            dropped_by_reason=account.dropped,
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
