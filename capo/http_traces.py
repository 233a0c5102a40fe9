"""The span of an HTTP request, from its head to the last byte of its answer."""

from __future__ import annotations

from opentelemetry import context, trace
from opentelemetry.trace import Span, SpanKind
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry import tracing
from serve import faces

_UNTRACED = frozenset({"/livez", "/readyz", "/startupz", "/metrics"})
"""What asks every few seconds whether we are there."""


class HttpTraces:
    """Stands outside of the door, so that refusals have spans; the door says which operation was asked for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self._app(scope, receive, send)
            return
        span = _begin(scope)
        state = scope["state"]

        async def send_with_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    tracing.fail_as(span, str(state.get("error_code") or message["status"]))
            await send(message)

        # Never detached: each request has a task of its own, and the handler of unknown errors runs further outside.
        context.attach(trace.set_span_in_context(span))
        try:
            await self._app(scope, receive, send_with_status if span.is_recording() else send)
        except Exception as error:
            tracing.fail(span, error)
            raise
        finally:
            _end(span, state.get("operation"))


def _begin(scope: Scope) -> Span:
    given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"] if name in _NAMES}
    attributes = {"http.request.method": scope["method"], "capo.request_id": scope["state"]["request_id"]}
    return tracing.begin(scope["method"], kind=SpanKind.SERVER, headers=given, attributes=attributes)


_NAMES = frozenset(name.encode() for name in faces.TRACE_HEADERS)


def _end(span: Span, operation: str | None) -> None:
    if operation is not None and span.is_recording():
        span.update_name(operation)
        span.set_attribute("http.route", operation.partition(" ")[2])
    span.end()
