"""``/v1/models``: every name that may stand in ``model`` and is meant to be called, as OpenAI's model objects."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from registry.principal import current_principal
from serve.catalog import Catalog
from serve.model_list import callable_models, who_may_call
from serve.model_removal import remove_model


def models_router(catalog: Catalog) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        models = await callable_models(catalog, current_principal())
        data = [_model(model.name, model.created_at, model.parent, model.revision) for model in models]
        return {"object": "list", "data": data}

    @router.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> dict[str, Any]:
        if not model:  # /v1/models/
            return await list_models()
        principal = who_may_call(model)
        if model == catalog.base_model:
            return _model(model, created=0)
        main = (await catalog.served_by(model, principal=principal))[0]
        return _model(model, main.manifest.created_at, catalog.base_model, main.revision)

    @router.delete("/v1/models/{model:path}")
    async def delete_model(model: str) -> dict[str, Any]:
        await remove_model(catalog, model)
        return {"id": model, "object": "model", "deleted": True}

    return router


def _model(name: str, created: int, parent: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """OpenAI's model object (openai 3.52, types/model.py); ``parent`` and ``revision`` are Capo's additions.

    Of an alias with a canary ``revision`` is the main one; GET /v1/aliases tells both.
    """
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "capo",
        "parent": parent,
        "revision": revision,
    }
