"""The composed HTTP application: routers of all rooms behind one set of request ids, limits and error bodies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from capo.error_answers import answer_error
from capo.http_door import HttpDoor
from capo.http_traces import HttpTraces
from capo.openapi import add_document
from registry import errors
from serve import faces
from serve.access import Access
from serve.engine_api import Endpoint

logger = logging.getLogger(__name__)

_UPLOAD_PATHS = ("/v1/files", "/v1/uploads/")  # they have their own limits where they are read


def build_app(
    routers: Sequence[APIRouter],
    not_ready_reason: Callable[[], str | None],
    engine_schema: Callable[[Endpoint], dict[str, Any]] | None = None,
    *,
    access: Access,
    only_this_machine: bool = False,
    serve_metrics: bool = True,
    metrics: CollectorRegistry = REGISTRY,
    max_body_bytes: int = faces.MAX_REQUEST_BYTES,
    stalled_reader_seconds: float = faces.STALLED_READER_SECONDS,
) -> FastAPI:
    """The application. ``not_ready_reason`` says why requests should not come here now, or ``None``.

    ``engine_schema``: what the engine takes, for the OpenAPI document (:func:`capo.openapi.add_document`).
    ``metrics``: what ``/metrics`` shows, where ``serve_metrics`` says that it is here.
    ``access`` decides who may come in; ``only_this_machine``: see :class:`capo.http_door.HttpDoor`.
    """
    app = _bare_app()
    for router in routers:
        app.include_router(router)
    app.include_router(_operations_router(not_ready_reason))
    if serve_metrics:
        app.include_router(_metrics_router(metrics))
    add_document(app, engine_schema)
    _add_manners(
        app,
        access,
        only_this_machine=only_this_machine,
        max_body_bytes=max_body_bytes,
        stalled_reader_seconds=stalled_reader_seconds,
    )
    return app


def build_metrics_app(access: Access) -> FastAPI:
    """``/metrics`` alone, for a port of its own."""
    app = _bare_app()
    app.include_router(_metrics_router(REGISTRY))
    _add_manners(app, access)
    return app


def build_health_app(not_ready_reason: Callable[[], str | None], access: Access) -> FastAPI:
    """The three probes alone, for a port of their own."""
    app = _bare_app()
    app.include_router(_operations_router(not_ready_reason))
    _add_manners(app, access)
    return app


def _bare_app() -> FastAPI:
    # A redirect would be answered before the door, and name whatever host the client did.
    return FastAPI(title="Capo", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)


def _add_manners(
    app: FastAPI,
    access: Access,
    *,
    only_this_machine: bool = False,
    max_body_bytes: int = faces.MAX_REQUEST_BYTES,
    stalled_reader_seconds: float = faces.STALLED_READER_SECONDS,
) -> None:
    """What every request meets, whatever it asks for."""
    app.add_exception_handler(errors.CapoError, _answer_capo_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(faces.ClientGoneError, _answer_nobody)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)  # it left before its body was whole
    app.add_middleware(BodyLimit, max_body_bytes=max_body_bytes)
    app.add_middleware(HttpDoor, routes=app, access=access, only_this_machine=only_this_machine)
    app.add_middleware(HeadsAsGets)
    app.add_middleware(HttpTraces)
    app.add_middleware(BugAnswers)
    app.add_middleware(RequestIds)
    app.add_middleware(StalledReaders, seconds=stalled_reader_seconds)


def _operations_router(not_ready_reason: Callable[[], str | None]) -> APIRouter:
    router = APIRouter()

    @router.get("/livez")
    async def livez() -> dict[str, str]:
        """The process runs its event loop. Readiness is another question."""
        return {"status": "alive"}

    @router.get("/startupz")
    async def startupz() -> Response:
        """503 until the engine has come up for the first time; afterwards its troubles are /readyz's."""
        is_starting = not_ready_reason() == "starting"
        return JSONResponse({"status": "starting" if is_starting else "started"}, 503 if is_starting else 200)

    @router.get("/readyz")
    async def readyz() -> Response:
        reason = not_ready_reason()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not_ready", "reason": reason}, 503)

    return router


def _metrics_router(registry: CollectorRegistry) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    async def metrics() -> Response:
        # Rendering a large page takes tens of milliseconds; the loop that streams tokens must not wait for it.
        page = await asyncio.to_thread(generate_latest, registry)
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    return router


# -- errors ------------------------------------------------------------------------------------------------------


async def _answer_capo_error(request: Request, error: Exception) -> Response:
    return answer_error(request.scope["state"], error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own refusals: no such route, wrong method, a body that is no form."""
    assert isinstance(error, HTTPException)
    code, headers = None, error.headers
    if error.status_code == 404:
        offered = ", ".join(sorted({path for route in request.app.routes if (path := _public_path(route))}))
        message = f"No route {request.method} {request.url.path[:200]}. Offered are {offered}."
        code = "unknown_url"  # OpenAI's
    elif error.status_code == 405:
        allowed = ", ".join(_methods_of(request))
        message = f"{request.method} is not allowed on {request.url.path[:200]}; allowed are {allowed}."
        code, headers = "method_not_allowed", {"Allow": allowed}  # the framework's names those of one route only
    else:
        message = str(error.detail)
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return JSONResponse(body, error.status_code, headers)


def _methods_of(request: Request) -> list[str]:
    """What the path of the request may be asked for by."""
    routes = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    methods = {method for route in routes for method in getattr(route, "methods", None) or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _public_path(route: BaseRoute) -> str | None:
    """The path of a route that a client may look for; those below another one, with a parameter, go without saying."""
    path = getattr(route, "path", "")
    return path if "{" not in path else None


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's code for a client that closed the connection; nobody reads it


# -- middleware --------------------------------------------------------------------------------------------------


class HeadsAsGets:
    """Whatever may be asked for by GET may be by HEAD (RFC 9110, section 9.3.2). uvicorn sends such answers bare."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)


class RequestIds:
    """Gives every request an id (the client's, where it is a plain token), in ``state`` and ``x-request-id``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = faces.request_id(given)
        scope.setdefault("state", {})["request_id"] = request_id
        faces.current_request_id.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


class BugAnswers:
    """A 500 for what nothing else answers. An answer that has begun can only be cut; the server does on an exception.

    Starlette's own handler of all exceptions raises them again after its answer, so the server logs each a second time.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noticing_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noticing_send)
        except Exception as error:
            if has_begun:
                raise
            logger.exception("request %s failed", scope["state"]["request_id"])
            scope["state"]["error_code"] = "internal_error"
            await JSONResponse(errors.openai_error_body(error), 500)(scope, receive, send)


class BodyLimit:
    """Refuses bodies over ``max_body_bytes`` while they are read, except of uploads."""

    def __init__(self, app: ASGIApp, max_body_bytes: int = faces.MAX_REQUEST_BYTES) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_UPLOAD_PATHS):
            await self._app(scope, receive, send)
            return
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body_bytes:
                    raise errors.TooLargeError(
                        f"The body is larger than {self._max_body_bytes} bytes. Send less, or upload a file."
                    )
            return message

        await self._app(scope, limited_receive, send)


class StalledReaders:
    """Gives up on a client that takes nothing for ``seconds``: it would hold its adapter in the engine for ever."""

    def __init__(self, app: ASGIApp, seconds: float = faces.STALLED_READER_SECONDS) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        is_stalled = False

        async def send_in_time(message: Message) -> None:
            nonlocal is_stalled
            try:
                async with asyncio.timeout(self._seconds):
                    await send(message)
            except TimeoutError as error:
                is_stalled = True
                scope.setdefault("state", {})["error_code"] = "stalled_reader"
                # What a broken connection raises; starlette ends the response on it.
                raise OSError(f"the client has read nothing for {self._seconds:g} s") from error

        try:
            await self._app(scope, receive, send_in_time)
        except Exception:
            if not is_stalled:  # else it is what came of it: nobody's bug, and nobody is left to answer
                raise
