"""The names that are meant to be called, as both faces list them."""

from __future__ import annotations

from dataclasses import dataclass

from serve.catalog import Catalog


@dataclass(frozen=True, slots=True)
class CallableModel:
    name: str
    created_at: int
    """Unix seconds; 0 for the base model."""
    parent: str | None = None
    """The base model of an adapter."""
    revision: str | None = None
    """What the name means now; ``None`` for the base model."""


def callable_models(catalog: Catalog) -> list[CallableModel]:
    """The base model, then every alias of an adapter by name."""
    snapshot = catalog.snapshot
    models = [CallableModel(catalog.base_model, created_at=0)]
    for name, alias in sorted(snapshot.aliases.items()):
        artifact = snapshot.artifacts.get(alias.revision)
        if artifact is not None and artifact.manifest.kind == "lora":
            models.append(CallableModel(name, artifact.manifest.created_at, catalog.base_model, artifact.revision))
    return models
