"""The HTTP face of permissions: OpenAI's paths and objects."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from registry import FineTunedName, Registry, check_name, parse_reference
from registry.errors import InvalidNameError, InvalidRequestError, ModelNotFoundError
from registry.names import shown
from registry.principal import current_principal
from registry.threads import Threads
from tune.jobs import wire
from tune.jobs.permissions.store import PermissionRecord, PermissionStore
from tune.jobs.query import limit_of, order_of, read_body, read_query
from tune.jobs.records import Page
from tune.jobs.requests import Body, parse_body

_DEFAULT_LIMIT = 10


class GrantBody(Body):
    project_ids: Annotated[list[str], Field(min_length=1, max_length=100)]


def permissions_router(store: PermissionStore, registry: Registry, threads: Threads) -> APIRouter:
    """POST and GET /v1/fine_tuning/checkpoints/{model}/permissions, DELETE one of them."""
    router = APIRouter(prefix="/v1/fine_tuning/checkpoints", tags=["fine-tuning"])

    def require_own(model: str) -> None:
        """Another tenant's model is as little there as one that nobody has."""
        try:
            name = parse_reference(model)
        except InvalidNameError:
            name = None
        principal = current_principal()
        if isinstance(name, FineTunedName):
            artifact = registry.on_behalf_of(principal).resolve(model)
            if principal.owns(artifact.manifest.tenant):
                return
        raise ModelNotFoundError(
            f"there is no fine-tuned model {shown(model)} of yours; GET /v1/models lists them", param="model"
        )

    # Granting what is granted changes nothing, so the request needs no Idempotency-Key to be repeated.
    @router.post("/{model:path}/permissions")
    async def grant(request: Request, model: str) -> JSONResponse:
        body = parse_body(await read_body(request), GrantBody)
        for project_id in body.project_ids:
            _check_tenant(project_id)
        await threads.run(require_own, model)
        granted = await threads.run(store.grant, model, body.project_ids)
        return JSONResponse(wire.list_object(Page(granted, False), _permission_object))

    @router.get("/{model:path}/permissions")
    async def list_permissions(request: Request, model: str) -> JSONResponse:
        query = read_query(request, ("after", "limit", "order", "project_id"))
        find = partial(
            store.page,
            model,
            after=query.get("after"),
            limit=limit_of(query, default=_DEFAULT_LIMIT),
            order=order_of(query, ascending="ascending", descending="descending"),
            project_id=query.get("project_id"),
        )
        await threads.run(require_own, model)
        return JSONResponse(wire.list_object(await threads.run(find), _permission_object))

    @router.delete("/{model:path}/permissions/{permission_id}")
    async def revoke(model: str, permission_id: str) -> JSONResponse:
        await threads.run(require_own, model)
        await threads.run(store.revoke, model, permission_id)
        return JSONResponse({"id": permission_id, "object": "checkpoint.permission", "deleted": True})

    return router


def _check_tenant(project_id: str) -> None:
    try:
        check_name(project_id)
    except InvalidNameError as error:
        raise InvalidRequestError(
            f"project_ids: {error.message} A project is a tenant of this service.",
            code="invalid_project",
            param="project_ids",
        ) from error


def _permission_object(record: PermissionRecord) -> dict[str, Any]:
    """openai/types/fine_tuning/checkpoints/permission_create_response.py."""
    return {
        "id": record.id,
        "object": "checkpoint.permission",
        "created_at": record.created_at,
        "project_id": record.project_id,
    }
