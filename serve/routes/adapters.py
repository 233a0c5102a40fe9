"""``/v1/adapters`` and ``/v1/aliases``: what the registry holds and what this service makes of it."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request

from registry import Alias, errors
from serve.service import AdapterView, ServingService


def adapters_router(service: ServingService) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/adapters")
    async def list_adapters() -> dict[str, Any]:
        adapters = [_adapter(view) for view in service.adapters()]
        return {"object": "list", "data": adapters}

    @router.get("/v1/aliases")
    async def list_aliases() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [_alias(a) for _, a in sorted(service.catalog.snapshot.aliases.items())],
        }

    @router.put("/v1/aliases/{alias}")
    async def set_alias(alias: str, request: Request) -> dict[str, Any]:
        revision = _revision_in(await request.body())
        return _alias(await service.set_alias(alias, revision))

    return router


def _revision_in(raw: bytes) -> str:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise errors.InvalidRequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(body, dict) or set(body) != {"revision"} or not isinstance(body["revision"], str):
        raise errors.InvalidRequestError(
            'The body must be {"revision": "<name>@<digest>"} and nothing else. GET /v1/adapters lists revisions.',
            param="revision",
        )
    return body["revision"]


def _adapter(view: AdapterView) -> dict[str, Any]:
    artifact, status = view.artifact, view.status
    manifest = artifact.manifest
    resident = status.resident
    reason = None if status.reason is None else {"code": status.reason.code, "message": status.reason.message}
    return {
        "object": "adapter",
        "name": artifact.name,
        "revision": artifact.revision,
        "digest": artifact.digest,
        "state": status.state.value,
        "reason": reason,
        "aliases": view.aliases,
        "base_model": manifest.base_model.id,
        "rank": manifest.lora.rank if manifest.lora is not None else None,
        "size_bytes": sum(record.size_bytes for record in manifest.files.values()),
        "created_at": manifest.created_at,
        "job_id": manifest.job_id,
        "requests_in_flight": resident.users if resident is not None else 0,
        "load_seconds": resident.load_seconds if resident is not None else None,
        "probe_agreement": resident.probe_agreement if resident is not None else None,
    }


def _alias(alias: Alias) -> dict[str, Any]:
    return {
        "object": "alias",
        "alias": alias.alias,
        "revision": alias.revision,
        "write_once": alias.write_once,
        "updated_at": alias.updated_at,
    }
