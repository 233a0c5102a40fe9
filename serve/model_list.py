"""The names that are meant to be called, as both faces list them, and who may call one."""

from __future__ import annotations

from dataclasses import dataclass

from registry import errors
from registry.principal import Principal, current_principal
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


def who_may_call(model: str) -> Principal:
    """Who asks.

    Raises:
        PermissionDeniedError: its key is for other models.
    """
    principal = current_principal()
    if not principal.may_call(model):
        raise errors.PermissionDeniedError(
            f"This key may not call {model[:200]!r}. GET /v1/models lists what it may.",
            code="model_not_allowed",
            param="model",
        )
    return principal
