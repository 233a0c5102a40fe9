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
        raise errors.PermissionDeniedError(
            f"'{model}' is the base model that this server runs; only fine-tuned models can be deleted.",
            code="base_model",
            param="model",
        )
    require_writable(catalog.registry, "remove a model")
    principal = current_principal()
    registry = await asyncio.to_thread(catalog.registry.on_behalf_of, principal)
    await asyncio.to_thread(registry.resolve, model)
    await catalog.served_by(model, principal=principal)
    await asyncio.to_thread(_remove, registry, model)
    await catalog.refresh()


def _remove(registry: Registry, model: str) -> None:
    if isinstance(parse_reference(model), RevisionReference):
        registry.remove(model)
        return
    # By the record that was removed: the catalog's picture may be of before a flip that another process made.
    alias = registry.remove_alias(model)
    for revision in [alias.revision] if alias.canary is None else [alias.revision, alias.canary.revision]:
        try:
            registry.remove(revision)
        except (errors.ConflictError, errors.PermissionDeniedError) as error:
            if error.code not in ("artifact_in_use", "shared_model"):
                raise
        except errors.ModelNotFoundError:
            continue  # somebody else was faster
