"""``DELETE /v1/models/{model}``: a name goes, and with its last name the artifact."""

from __future__ import annotations

import asyncio

from registry import Registry, RevisionReference, errors, parse_reference
from registry.principal import current_principal
from serve.catalog import Catalog
from serve.read_only import require_writable


async def remove_model(catalog: Catalog, model: str) -> None:
    """Remove an alias, an ``ft:`` name or a revision.

    What the name pointed to goes too, unless another name serves it, another artifact has it as its base, or it
    is shared by all and not the asker's to remove. Requests that run on it end as they began.

    Raises:
        PermissionDeniedError: it is the base model, or shared by all, or the registry is read-only here.
        ModelNotFoundError: there is no such model.
        ConflictError: a revision that something else needs.
    """
    if model == catalog.base_model:
        raise _is_base(model)
    require_writable(catalog.registry, "remove a model")
    principal = current_principal()
    registry = await asyncio.to_thread(catalog.registry.on_behalf_of, principal)
    artifact = await asyncio.to_thread(registry.resolve, model)
    await catalog.served_by(model, principal=principal)
    if artifact.revision == catalog.base_model:  # also by another name of it, or more digits
        raise _is_base(model)
    await catalog.changes.run(_remove, registry, model, catalog.base_model)
    await catalog.refresh()


def _is_base(model: str) -> errors.PermissionDeniedError:
    return errors.PermissionDeniedError(
        f"'{model}' is the base model that this server runs; only fine-tuned models can be deleted.",
        code="base_model",
        param="model",
    )


def _remove(registry: Registry, model: str, base_model: str) -> None:
    if isinstance(parse_reference(model), RevisionReference):
        registry.remove(model)
    else:
        registry.remove_named(model, keep=base_model)
