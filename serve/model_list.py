"""The names that are meant to be called, as both faces list them."""

from __future__ import annotations

from dataclasses import dataclass

from registry.principal import Principal
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


def callable_models(catalog: Catalog, principal: Principal) -> list[CallableModel]:
    """The base model, then every alias of an adapter by name, as far as the principal may call them."""
    snapshot = catalog.snapshot
    models = [CallableModel(catalog.base_model, created_at=0)]
    for alias in snapshot.aliases_of(principal):
        artifact = snapshot.artifacts.get(alias.revision)
        if artifact is not None and artifact.manifest.kind == "lora":
            created_at = artifact.manifest.created_at
            models.append(CallableModel(alias.alias, created_at, catalog.base_model, artifact.revision))
    return [model for model in models if principal.may_call(model.name)]
