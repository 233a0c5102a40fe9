"""The span of one inference request: who answered, how many tokens, how it ended. Ends with the last token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.trace import Span, SpanKind

from registry import Artifact, tracing
from serve.engine_api import Call, Endpoint

_MAX_NAME_CHARACTERS = 200
"""Of the model as the client wrote it."""


class RequestTrace:
    """Attributes are OpenTelemetry's for generative AI (``gen_ai.``) where it has one, else ours (``capo.``)."""

    def __init__(self, span: Span, given_headers: Mapping[str, str]) -> None:
        self._span = span
        self._given_headers = given_headers
        self._call: Call | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """W3C trace context for the engine: this span's, or what the client sent where no span is recorded."""
        return tracing.headers_of(self._span) if self._span.is_recording() else self._given_headers

    def follow(self, call: Call, artifact: Artifact | None) -> None:
        self._call = call
        if not self._span.is_recording():
            return
        self._span.set_attribute("gen_ai.response.model", call.answer_model)
        if artifact is not None:
            self._span.set_attribute("capo.adapter", artifact.name)
            self._span.set_attribute("capo.revision", artifact.revision)

    def end(self) -> None:
        call, span = self._call, self._span
        if call is not None and span.is_recording():
            span.set_attribute("gen_ai.usage.input_tokens", call.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", call.completion_tokens)
            if call.finish_reasons:
                span.set_attribute("gen_ai.response.finish_reasons", call.finish_reasons)
            if call.first_token_at is not None:
                span.set_attribute("capo.time_to_first_token_seconds", call.first_token_at - call.created_at)
            if call.queued_seconds is not None:
                span.set_attribute("capo.queued_seconds", call.queued_seconds)
        span.end()


@contextmanager
def traced(
    endpoint: Endpoint, model: str, *, protocol: str, request_id: str, headers: Mapping[str, str]
) -> Iterator[RequestTrace]:
    """The span is never the current one: a stream's generator is resumed from several tasks, each with its own."""
    has_parent = tracing.current_span().get_span_context().is_valid
    span = tracing.begin(
        f"inference {endpoint}",
        kind=SpanKind.INTERNAL,
        headers=None if has_parent else headers,
        attributes={
            "gen_ai.operation.name": "text_completion" if endpoint is Endpoint.COMPLETION else "chat",
            "gen_ai.request.model": model[:_MAX_NAME_CHARACTERS],
            "capo.protocol": protocol,
            "capo.request_id": request_id,
        },
    )
    trace = RequestTrace(span, headers)
    try:
        yield trace
    except Exception as error:
        tracing.fail(span, error)
        raise
    except BaseException:  # the client left: GeneratorExit, or the task was cancelled
        span.set_attribute("capo.cancelled", True)
        raise
    finally:
        trace.end()
