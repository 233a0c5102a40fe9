"""The HTTP face of webhook endpoints: OpenAI's paths and objects."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from registry.errors import InvalidRequestError
from registry.principal import current_principal
from registry.threads import Threads
from tune.jobs import wire
from tune.jobs.query import idempotency_of, limit_of, read_body, read_query
from tune.jobs.requests import Body, parse_body
from tune.jobs.webhooks.endpoints import EndpointRecord, EndpointStore

_MAX_URL = 2048
_HINTED_CHARACTERS = 4


class CreateEndpointBody(Body):
    name: Annotated[str, Field(min_length=1, max_length=128)]
    url: str
    event_types: Annotated[
        list[Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]],
        Field(min_length=1),
    ]


def webhooks_router(store: EndpointStore, threads: Threads) -> APIRouter:
    """POST and GET /v1/webhook_endpoints, GET and DELETE one of them."""
    router = APIRouter(prefix="/v1/webhook_endpoints", tags=["webhooks"])

    def own() -> EndpointStore:
        return store.seen_by(current_principal().tenant)

    @router.post("")
    async def create_endpoint(request: Request) -> JSONResponse:
        raw = await read_body(request)
        asked = idempotency_of(request, raw, making="webhook_endpoint")
        body = parse_body(raw, CreateEndpointBody)
        _check_url(body.url)
        if "\0" in body.name:
            raise InvalidRequestError("name: the character NUL is not allowed", param="name")
        create = partial(own().create, name=body.name, url=body.url, event_types=body.event_types, asked=asked)
        made = await threads.run(create)
        return JSONResponse(_endpoint_object(made) | {"signing_secret": made.secret})

    @router.get("")
    async def list_endpoints(request: Request) -> JSONResponse:
        query = read_query(request, ("after", "limit"))
        find = partial(own().page, after=query.get("after"), limit=limit_of(query))
        return JSONResponse(wire.list_object(await threads.run(find), _endpoint_object))

    @router.get("/{endpoint_id}")
    async def retrieve_endpoint(endpoint_id: str) -> JSONResponse:
        return JSONResponse(_endpoint_object(await threads.run(own().get, endpoint_id)))

    @router.delete("/{endpoint_id}")
    async def delete_endpoint(endpoint_id: str) -> JSONResponse:
        await threads.run(own().delete, endpoint_id)
        return JSONResponse({"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True})

    return router


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_good = (
            len(url) <= _MAX_URL
            and url.isascii()
            and url.isprintable()
            and " " not in url
            and parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.username is None
            and not parts.fragment
            and parts.port != 0
            and bool(httpx.URL(url).host)  # what sends to it must read it too; an xn-- label may be none
        )
    except (ValueError, httpx.InvalidURL):
        is_good = False
    if not is_good:
        raise InvalidRequestError(
            f"url must be http:// or https:// with a host, without a user, a fragment or characters beyond ASCII, and "
            f"at most {_MAX_URL} characters long, got {url[:80]!r}",
            code="invalid_url",
            param="url",
        )


def _endpoint_object(endpoint: EndpointRecord) -> dict[str, Any]:
    """openai/types/webhooks/webhook_endpoint.py; the secret itself is shown only to whoever creates it."""
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "created_at": endpoint.created_at,
        "updated_at": endpoint.created_at,
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": list(endpoint.event_types),
        "signing_secret_hint": f"whsec_...{endpoint.secret[-_HINTED_CHARACTERS:]}",
    }
