"""``/v1/adapters``, ``/v1/pins`` and ``/v1/aliases``: what the registry holds and what this service makes of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from registry import Alias, CanaryRequest, DamagedArtifact, errors
from registry.principal import current_principal
from serve.alias_control import AliasControl
from serve.catalog import Catalog
from serve.pins import Pin
from serve.resident import AdapterState
from serve.routes.bodies import Body, read_body, read_no_body
from serve.service import AdapterView, ServingService


class CanaryBody(Body):
    revision: str
    percent: int


class AliasBody(Body):
    revision: str
    canary: CanaryBody | None = None
    """Left out: a running canary ends."""
    expected: str | None = None
    """Only if the alias points to this revision now."""


def adapters_router(service: ServingService) -> APIRouter:
    router = aliases_router(service.aliases, service.catalog)
    _add_adapter_routes(router, service)
    return router


# A base model id may hold a slash, and so may the ft: names that begin with it; hence {...:path}.
def _add_adapter_routes(router: APIRouter, service: ServingService) -> None:
    @router.get("/v1/adapters")
    async def list_adapters() -> dict[str, Any]:
        adapters = [_adapter(view) for view in service.adapters()]
        damaged = [_damaged(each) for each in service.damaged_adapters()]
        return {"object": "list", "data": adapters + damaged}

    @router.get("/v1/pins")
    async def list_pins() -> dict[str, Any]:
        return {"object": "list", "data": [_pin(pin) for pin in service.pins.seen_by(current_principal())]}

    @router.put("/v1/adapters/{reference:path}/pin")
    async def pin_adapter(reference: str, request: Request) -> dict[str, Any]:
        read_no_body(await request.body())
        return _pin(await service.pin(reference))

    @router.delete("/v1/adapters/{reference:path}/pin")
    async def unpin_adapter(reference: str) -> dict[str, Any]:
        service.pins.remove(reference, principal=current_principal())
        return {"object": "pin", "reference": reference, "deleted": True}


def aliases_router(aliases: AliasControl, catalog: Catalog) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/aliases")
    async def list_aliases() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [_alias(alias) for alias in catalog.snapshot.aliases_of(current_principal())],
        }

    @router.get("/v1/aliases/{alias:path}")
    async def retrieve_alias(alias: str) -> dict[str, Any]:
        return _alias_with_history(await aliases.get(alias))

    @router.put("/v1/aliases/{alias:path}")
    async def set_alias(alias: str, request: Request) -> dict[str, Any]:
        body = read_body(AliasBody, await request.body())
        canary = None if body.canary is None else CanaryRequest(body.canary.revision, body.canary.percent)
        flip = await aliases.set(alias, body.revision, canary=canary, expected=body.expected)
        return _alias_with_history(flip.alias) | {"warmed": flip.is_warm}

    @router.post("/v1/aliases/{alias:path}/rollback")
    async def roll_back_alias(alias: str, request: Request) -> dict[str, Any]:
        read_no_body(await request.body())
        return _alias_with_history(await aliases.roll_back(alias))

    @router.delete("/v1/aliases/{alias:path}")
    async def delete_alias(alias: str) -> dict[str, Any]:
        await aliases.remove(alias)
        return {"object": "alias", "alias": alias, "deleted": True}

    return router


def _adapter(view: AdapterView) -> dict[str, Any]:
    artifact, status = view.artifact, view.status
    manifest = artifact.manifest
    resident = status.resident
    return {
        "object": "adapter",
        "name": artifact.name,
        "revision": artifact.revision,
        "digest": artifact.digest,
        "state": status.state.value,
        "reason": _reason(status.reason),
        "notes": list(status.notes),
        "pinned": status.is_pinned,
        "aliases": view.aliases,
        "canary_of": view.canary_of,
        "base_model": manifest.base_model.id,
        "rank": manifest.lora.rank if manifest.lora is not None else None,
        "size_bytes": sum(record.size_bytes for record in manifest.files.values()),
        "created_at": manifest.created_at,
        "job_id": manifest.job_id,
        "requests_in_flight": resident.users if resident is not None else 0,
        "load_seconds": resident.load_seconds if resident is not None else None,
        "probe_agreement": resident.probe_agreement if resident is not None else None,
    }


def _damaged(damaged: DamagedArtifact) -> dict[str, Any]:
    """What can be said of a directory that is no artifact: what it is named by, and why it is none."""
    return {
        "object": "adapter",
        "name": damaged.name,
        "revision": damaged.revision,
        "digest": damaged.digest,
        "state": AdapterState.REFUSED.value,
        "reason": _reason(damaged.error),
        "notes": [],
        "pinned": False,
        "aliases": [],
        "canary_of": [],
        "base_model": None,
        "rank": None,
        "size_bytes": None,
        "created_at": None,
        "job_id": None,
        "requests_in_flight": 0,
        "load_seconds": None,
        "probe_agreement": None,
    }


def _pin(pin: Pin) -> dict[str, Any]:
    return {
        "object": "pin",
        "reference": pin.reference,
        "state": pin.state.value,
        "reason": _reason(pin.reason),
        "revisions": pin.revisions,
    }


def _reason(error: errors.CapoError | None) -> dict[str, str] | None:
    return None if error is None else {"code": error.code, "message": error.message}


def _alias(alias: Alias) -> dict[str, Any]:
    canary = alias.canary
    return {
        "object": "alias",
        "alias": alias.alias,
        "revision": alias.revision,
        "canary": None if canary is None else {"revision": canary.revision, "percent": canary.percent},
        "write_once": alias.write_once,
        "updated_at": alias.updated_at,
    }


def _alias_with_history(alias: Alias) -> dict[str, Any]:
    return _alias(alias) | {"history": [{"revision": entry.revision, "at": entry.at} for entry in alias.history]}
