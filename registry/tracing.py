"""Spans of requests and jobs, by OpenTelemetry's own API; here because both ``serve`` and ``tune`` open some.

Until :func:`export_to` is called nothing is recorded: a span is then only the place where a client's W3C trace context
is kept. A span holds names, counts and codes, and never a prompt, an answer, a key or the text of an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from registry import errors

# Not OpenTelemetry's global propagator: that one also passes on baggage, which may hold anything.
_W3C = TraceContextTextMapPropagator()
_TRACER = trace.get_tracer("capo")
_EXPORT_TIMEOUT_SECONDS = 5
"""Also bounds how long a collector that is gone delays the end of the process."""


def begin(
    name: str,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    headers: Mapping[str, str] | None = None,
    attributes: Mapping[str, str | int] | None = None,
) -> Span:
    """A span that whoever asked for it ends. Its parent is what ``headers`` name, or without them the current span."""
    parent = None if headers is None else _W3C.extract(headers, context=Context())
    return _TRACER.start_span(name, parent, kind=kind, attributes=attributes)


@contextmanager
def current(span: Span) -> Iterator[None]:
    """Make it the parent of spans, and the trace of log lines, of the block; for blocks that stay in one task."""
    token = context.attach(trace.set_span_in_context(span))
    try:
        yield
    finally:
        context.detach(token)


def current_span() -> Span:
    return trace.get_current_span()


def headers_of(span: Span) -> dict[str, str]:
    """``traceparent`` and ``tracestate`` for what is asked on behalf of this span; nothing where there is no trace."""
    headers: dict[str, str] = {}
    _W3C.inject(headers, context=trace.set_span_in_context(span, Context()))
    return headers


def fail(span: Span, error: BaseException) -> None:
    """Say how it failed, by the code of the error alone. What a client did wrong is no fault of the service."""
    if not span.is_recording():
        return
    code = error.code if isinstance(error, errors.CapoError) else type(error).__name__
    if errors.wire_kind(error).http_status < 500:
        span.set_attribute("error.type", code)
    else:
        fail_as(span, code)


def fail_as(span: Span, code: str) -> None:
    """A fault of ours, by its code."""
    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR))


def export_to(endpoint: str, *, role: str) -> Callable[[], None]:
    """Record from now on, and send to an OTLP collector, by HTTP; call once in a process. The result, called, sends
    what is left and ends it.

    ``endpoint``: ``http://host:4318``; the path is OTLP's own unless there is one. Sampling, headers and certificates
    are OpenTelemetry's own variables (``OTEL_TRACES_SAMPLER``, ``OTEL_EXPORTER_OTLP_HEADERS`` ...).
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": "capo", "capo.role": role, "process.pid": os.getpid()})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=_EXPORT_TIMEOUT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def traces_url(endpoint: str) -> str:
    scheme, _, rest = endpoint.partition("://")
    host, _, path = rest.partition("/")
    return f"{scheme}://{host}/{path or 'v1/traces'}"
