"""Adapters as a job's training would have published them, written without any training."""

from __future__ import annotations

import secrets
from typing import Any

from registry import Artifact, BaseModelIdentity, LoraShape, ManifestDraft
from registry.principal import Principal
from tests.registry.samples import write_adapter
from tests.tune.jobs.support import BASE, TENANT, Place
from tune.jobs.records import JobRecord


def publish_adapter(
    place: Place, name: str, *, job_id: str | None = None, tenant: str = TENANT, base: str = BASE, **fields: Any
) -> Artifact:
    """An adapter of rank 4 on q_proj and v_proj, under an ``ft:`` name."""
    draft = ManifestDraft(
        **{
            "kind": "lora",
            "name": "made",
            "base_model": BaseModelIdentity(id=base),
            "lora": LoraShape(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj"]),
            "dtype": "float32",
            "job_id": job_id,
            **fields,
        }
    )
    directory = write_adapter(place.directory / f"adapter-{secrets.token_hex(4)}")
    registry = place.registry.on_behalf_of(Principal.for_work(tenant, house="house"))
    return registry.publish(directory, draft, fine_tuned_name=name)


def publish_job(place: Place, job: JobRecord, *, steps: int, checkpoints: tuple[int, ...] = ()) -> None:
    """What a run leaves in the registry: its checkpoints and its result."""
    for step in checkpoints:
        metrics = {"step": step, "train_loss": 0.5, "train_mean_token_accuracy": 0.25, "full_valid_loss": 0.75}
        publish_adapter(place, f"{job.reserved_name}:ckpt-step-{step}", job_id=job.id, metrics=metrics)
    metrics = {"steps": steps, "1-sft.train_loss": 0.125, "1-sft.valid_loss": 0.5, "1-sft.base_valid_loss": 3.0}
    recipe = {"stages": [{"kind": "sft"}]}
    publish_adapter(place, job.reserved_name, job_id=job.id, metrics=metrics, recipe=recipe)
