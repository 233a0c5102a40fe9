"""The gRPC server: Capo's services, health, reflection, and errors from the one table.

Runs on the same event loop as HTTP, and calls the same service.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from capo_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from registry import errors
from serve.grpc.adapters import AdaptersServicer
from serve.grpc.inference import InferenceServicer
from serve.service import ServingService

logger = logging.getLogger(__name__)

_SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].full_name,
)
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""The same as the HTTP face's largest body."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Without it two servers share a taken port in silence, each getting some of the requests.
    ("grpc.so_reuseport", 0),
    # Clients may keep an idle connection alive; a ping every 10 s is not an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


class GrpcServer:
    """Owns the server between :meth:`start` and :meth:`stop`. Health says NOT_SERVING until told otherwise."""

    def __init__(self, service: ServingService) -> None:
        self._server = grpc.aio.server(interceptors=[_ErrorInterceptor()], options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(service), self._server)
        adapters_pb2_grpc.add_AdaptersServicer_to_server(AdaptersServicer(service), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which differs from ``port`` when that is 0.

        Raises:
            UnavailableError: the address is taken.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise errors.UnavailableError(
                f"Cannot listen for gRPC on {address}. Choose another --grpc-port, or 0 for a free one."
            ) from error
        await self.set_serving(False)
        await self._server.start()
        return int(bound)

    async def set_serving(self, is_serving: bool) -> None:
        """What the health service says, for the server as a whole and for each service."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *_SERVICES):
            await self._health.set(name, status)

    async def stop(self) -> None:
        """End at once; the caller has drained."""
        await self._server.stop(grace=None)


class _ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns our errors into status codes, and everything else into an INTERNAL without detail."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        if handler.unary_unary is not None:
            behaviour = handler.unary_unary

            async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
                try:
                    return await behaviour(request, context)
                except Exception as error:
                    await _abort(context, error, details.method)

            return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, handler.response_serializer)
        if handler.unary_stream is not None:
            streaming = handler.unary_stream

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                try:
                    async for message in streaming(request, context):
                        yield message
                except Exception as error:
                    await _abort(context, error, details.method)

            return grpc.unary_stream_rpc_method_handler(
                stream, handler.request_deserializer, handler.response_serializer
            )
        return handler  # reflection streams both ways and raises nothing of ours


async def _abort(context: grpc.aio.ServicerContext, error: Exception, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    kind = errors.wire_kind(error)
    body = errors.openai_error_body(error)["error"]
    if kind.http_status == 500:
        logger.error("%s failed", method, exc_info=error)
    trailers = [("capo-error-code", str(body["code"]))]
    if isinstance(error, errors.CapoError) and error.retry_after_seconds is not None:
        trailers.append(("retry-after", str(max(1, round(error.retry_after_seconds)))))
    await context.abort(getattr(grpc.StatusCode, kind.grpc_code), str(body["message"]), tuple(trailers))
