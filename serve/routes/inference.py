"""``/v1/chat/completions``, ``/v1/completions``, ``/v1/responses``, ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from registry import errors, tracing
from serve import faces
from serve.engine_api import Endpoint
from serve.request_counts import counted
from serve.request_policy import parse_body
from serve.service import Origin, ServingService

logger = logging.getLogger(__name__)

_PROTOCOL = "http"


def inference_router(service: ServingService) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        return await _answer(service, Endpoint.CHAT, request)

    @router.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        return await _answer(service, Endpoint.COMPLETION, request)

    @router.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        return await _answer(service, Endpoint.RESPONSES, request)

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await _convert_tokens(service, Endpoint.TOKENIZE, request)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await _convert_tokens(service, Endpoint.DETOKENIZE, request)

    return router


async def _convert_tokens(service: ServingService, endpoint: Endpoint, request: Request) -> Response:
    body = parse_body(await request.body(), endpoint)
    return Response(await service.convert_tokens(endpoint, body), media_type="application/json")


async def _answer(service: ServingService, endpoint: Endpoint, request: Request) -> Response:
    raw = await request.body()
    origin = Origin(
        _PROTOCOL,
        request.state.request_id,
        {name: request.headers[name] for name in faces.TRACE_HEADERS if name in request.headers},
    )
    with contextlib.ExitStack() as counting:
        counting.enter_context(counted(service.metrics, _PROTOCOL))
        body = parse_body(raw, endpoint)
        if not body.get("stream"):
            answer = await _until_client_leaves(request, service.complete(endpoint, body, origin))
            return Response(answer, media_type="application/json")
        events = _events(endpoint, service.stream(endpoint, body, origin), counting.pop_all())
    # The first event is awaited before the status goes out, so that what fails before it has a real status code.
    first = await _until_client_leaves(request, anext(events))
    return _EventStream(first, events)


class _EventStream(StreamingResponse):
    """Ends its events when it ends itself. A client that stalls leaves them unfinished, and in a reference cycle with
    the exception that says so: until the garbage collector came by, they would hold the adapter in the engine."""

    def __init__(self, first: str, others: AsyncGenerator[str, None]) -> None:
        super().__init__(_with_first(first, others), media_type="text/event-stream")
        self._unfinished = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._unfinished):
            await super().__call__(scope, receive, send)


async def _with_first(first: str, others: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    yield first
    async for event in others:
        yield event


async def _events(
    endpoint: Endpoint, chunks: AsyncGenerator[str, None], counting: contextlib.ExitStack
) -> AsyncGenerator[str, None]:
    """The stream as sent. An error before the first event is raised; a later one becomes the last event, and then what
    ends a whole answer never comes."""
    num_sent = 0
    try:
        with counting:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
                    num_sent += 1
    except Exception as error:
        if not num_sent:
            raise
        if not isinstance(error, errors.CapoError):
            logger.error("a stream failed", exc_info=error)
        tracing.fail(tracing.current_span(), error)
        yield _error_event(endpoint, error, num_sent)


def _error_event(endpoint: Endpoint, error: Exception, num_sent: int) -> str:
    body = errors.openai_error_body(error)
    if endpoint is not Endpoint.RESPONSES:
        return f"data: {json.dumps(body)}\n\n"
    # OpenAI's event of this endpoint (openai 3.52, types/responses/response_error_event.py).
    told = {name: body["error"][name] for name in ("code", "message", "param")}
    return f"event: error\ndata: {json.dumps({'type': 'error', **told, 'sequence_number': num_sent})}\n\n"


async def _until_client_leaves(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Run ``work``, cancelling it as soon as the client disconnects. The body must have been read.

    Cancelling aborts the request in the engine, which frees its KV blocks within a step.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise faces.ClientGoneError
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return
