"""The names that are meant to be called, as both faces list them, and who may call one."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from registry import Alias, errors
from registry.principal import Principal, current_principal
from serve.catalog import Catalog

logger = logging.getLogger(__name__)

_SHARES_SECONDS = 2.0
"""One query of milliseconds. Most of the list needs no database, so it does not wait for one that hangs."""


@dataclass(frozen=True, slots=True)
class CallableModel:
    name: str
    created_at: int
    """Unix seconds; 0 for the base model."""
    parent: str | None = None
    """The base model of an adapter."""
    revision: str | None = None
    """What the name means now; ``None`` for the base model."""


async def callable_models(catalog: Catalog, principal: Principal) -> list[CallableModel]:
    """The base model, then every alias of an adapter by name, as far as the principal may call them."""
    snapshot = catalog.snapshot
    models = [CallableModel(catalog.base_model, created_at=0)]
    aliases = [*snapshot.aliases_of(principal), *await _shared_aliases(catalog, principal)]
    for alias in sorted(aliases, key=lambda alias: alias.alias):
        artifact = snapshot.artifacts.get(alias.revision)
        if artifact is not None and artifact.manifest.kind == "lora":
            created_at = artifact.manifest.created_at
            models.append(CallableModel(alias.alias, created_at, catalog.base_model, artifact.revision))
    return [model for model in models if principal.may_call(model.name)]


async def _shared_aliases(catalog: Catalog, principal: Principal) -> list[Alias]:
    """Other tenants' aliases that it may use. None while that cannot be found out, for then it cannot call them."""
    aliases = catalog.snapshot.aliases.values()
    others = [alias for alias in aliases if not principal.sees(alias.tenant) and principal.may_call(alias.alias)]
    if not others or catalog.shares is None:
        return []
    try:
        async with asyncio.timeout(_SHARES_SECONDS):
            shared = await catalog.shares.shared_with(principal.tenant)
    except (errors.UnavailableError, errors.StorageError, TimeoutError) as error:
        logger.warning("the list of models lacks those that other tenants share: %s", error or "no answer in time")
        return []
    return [alias for alias in others if alias.alias in shared]


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
