"""What every call of Capo's services gets: a request id, a look at who asks, a checked message, patience with an end,
and our errors.

Other services on the same server (health, reflection) keep their own manners, but for the look at who asks.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.trace import SpanKind

from registry import errors, tracing
from serve import faces
from serve.access import Access, Ask
from serve.grpc.requests import refuse_unknown_fields
from serve.grpc.stalled_writes import StalledWrites

logger = logging.getLogger(__name__)

# Details travel as a header, of which a client takes 8 KiB by default; other than ASCII becomes three times as long.
_MAX_DETAILS_CHARACTERS = 1000

# The client has left, or the status has gone out already; nobody is left to tell.
_CALL_IS_OVER = (grpc.aio.AbortError, grpc.aio.InternalError)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """``own_services`` are the full names of the services whose calls it looks after; ``access`` decides on all."""

    def __init__(
        self,
        own_services: tuple[str, ...],
        access: Access,
        *,
        stalled_reader_seconds: float,
        max_metadata_bytes: int,
        max_message_bytes: int,
    ) -> None:
        self._prefixes = tuple(f"/{service}/" for service in own_services)
        self._access = access
        self._stalled_reader_seconds = stalled_reader_seconds
        self._max_metadata_bytes = max_metadata_bytes
        self._max_message_bytes = max_message_bytes

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return handler
        if not details.method.startswith(self._prefixes):
            return self._foreign(handler, details.method)
        assert not handler.request_streaming, f"{details.method} takes a stream, which is not looked after here yet"
        # Without a deserializer the bytes come here: what grpc says of bad ones is UNKNOWN and the text of a traceback.
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(handler, details.method), None, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler, details.method), None, handler.response_serializer
        )

    def _foreign(self, handler: Any, method: str) -> Any:
        """Another service's handler behind the same door: health answers in one piece or streams, reflection talks."""
        reading, writing = handler.request_deserializer, handler.response_serializer
        if handler.request_streaming:

            async def talk(
                requests: AsyncIterator[Any], context: grpc.aio.ServicerContext
            ) -> AsyncGenerator[Any, None]:
                async with self._call(context, method):
                    async for message in handler.stream_stream(requests, context):
                        yield message

            return grpc.stream_stream_rpc_method_handler(talk, reading, writing)
        if handler.response_streaming:

            async def watch(request: Any, context: grpc.aio.ServicerContext) -> None:
                async with self._call(context, method):
                    await handler.unary_stream(request, context)

            return grpc.unary_stream_rpc_method_handler(watch, reading, writing)

        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._call(context, method):
                return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, reading, writing)

    def _unary(self, handler: Any, method: str) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[Any]]:
        async def unary(raw: bytes, context: grpc.aio.ServicerContext) -> Any:
            async with self._call(context, method):
                return await handler.unary_unary(self._decode(raw, handler.request_deserializer), context)

        return unary

    def _streaming(self, handler: Any, method: str) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[None]]:
        async def streaming(raw: bytes, context: grpc.aio.ServicerContext) -> None:
            async with self._call(context, method), StalledWrites(self._stalled_reader_seconds) as writes:
                messages = handler.unary_stream(self._decode(raw, handler.request_deserializer), context)
                async with contextlib.aclosing(messages):
                    async for message in messages:
                        writes.begin()
                        await context.write(message)
                        writes.end()

        return streaming

    @contextlib.asynccontextmanager
    async def _call(self, context: grpc.aio.ServicerContext, method: str) -> AsyncGenerator[None, None]:
        metadata = {str(name): str(value) for name, value in context.invocation_metadata() or ()}
        call_id = faces.request_id(metadata.get("x-request-id", ""))
        faces.current_request_id.set(call_id)
        ask = Ask("grpc", method, metadata.get("authorization"), _peer(context), call_id)
        with _span(method, metadata, call_id) if method.startswith(self._prefixes) else contextlib.nullcontext():
            try:
                await context.send_initial_metadata((("x-request-id", call_id),))
                with self._access.let_in(ask):
                    self._refuse_excess(metadata)
                    try:
                        yield
                    except grpc.aio.AbortError:
                        # Another service's handler refused, and has said so itself; ours raise errors of our own.
                        ask.error_code = str(context.code().name).lower()
                        raise
            except _CALL_IS_OVER:
                raise
            except Exception as error:
                tracing.fail(tracing.current_span(), error)
                await _abort(context, error, f"request {call_id} ({method})")

    def _decode(self, raw: bytes, deserialize: Callable[[bytes], Any]) -> Any:
        if len(raw) > self._max_message_bytes:
            raise errors.TooLargeError(f"The message is larger than {self._max_message_bytes} bytes. Send less.")
        return _decode(raw, deserialize)

    def _refuse_excess(self, metadata: dict[str, str]) -> None:
        if sum(len(name) + len(value) for name, value in metadata.items()) > self._max_metadata_bytes:
            raise errors.TooLargeError(
                f"The metadata is larger than {self._max_metadata_bytes} bytes. Send less.", code="headers_too_large"
            )


@contextlib.contextmanager
def _span(method: str, metadata: dict[str, str], call_id: str) -> Iterator[None]:
    """Of one call, from its metadata to its status; OpenTelemetry's names for RPCs."""
    service, _, name = method.lstrip("/").partition("/")
    span = tracing.begin(
        method.lstrip("/"),
        kind=SpanKind.SERVER,
        headers={header: metadata[header] for header in faces.TRACE_HEADERS if header in metadata},
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name, "capo.request_id": call_id},
    )
    try:
        with tracing.current(span):
            yield
    finally:
        span.end()


def _peer(context: grpc.aio.ServicerContext) -> str:
    """``127.0.0.1`` of ``ipv4:127.0.0.1:50000``."""
    return str(context.peer()).partition(":")[2].rpartition(":")[0] or "-"


def _decode(raw: bytes, deserialize: Callable[[bytes], Any]) -> Any:
    try:
        message = deserialize(raw)
    except DecodeError as error:
        raise errors.InvalidRequestError(
            "The message cannot be read as this method's request. Server reflection shows what it takes.",
            code="invalid_message",
        ) from error
    refuse_unknown_fields(message)
    return message


async def _abort(context: grpc.aio.ServicerContext, error: Exception, what: str) -> None:
    kind = errors.wire_kind(error)
    body = errors.openai_error_body(error)["error"]
    if not isinstance(error, errors.CapoError):
        logger.error("%s failed", what, exc_info=error)
    elif kind.http_status >= 500:
        logger.warning("%s: %s", what, error)
    trailers = [("capo-error-code", str(body["code"]))]
    if (param := body["param"]) is not None and str(param).isascii() and str(param).isprintable():
        trailers.append(("capo-error-param", str(param)))
    if isinstance(error, errors.CapoError) and error.retry_after_seconds is not None:
        trailers.append(("retry-after", str(max(1, round(error.retry_after_seconds)))))
    details = str(body["message"])[:_MAX_DETAILS_CHARACTERS]
    await context.abort(getattr(grpc.StatusCode, kind.grpc_code), details, tuple(trailers))
