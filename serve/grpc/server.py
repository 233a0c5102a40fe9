"""The gRPC server: Capo's services, health, reflection, and errors from the one table.

Runs on the same event loop as HTTP, and calls the same service.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from capo_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from registry import errors
from serve import faces
from serve.grpc.adapters import AdaptersServicer
from serve.grpc.inference import InferenceServicer
from serve.grpc.interceptor import CallInterceptor
from serve.service import ServingService

_SERVICES = tuple(
    service.full_name
    for definition in (inference_pb2, adapters_pb2)
    for service in definition.DESCRIPTOR.services_by_name.values()
)

_OPTIONS = (
    ("grpc.max_receive_message_length", faces.MAX_REQUEST_BYTES),
    # What an answer may grow to is bounded by what a request may ask for; a client sets what it takes.
    ("grpc.max_send_message_length", -1),
    # Without it two servers share a taken port in silence, each getting some of the requests.
    ("grpc.so_reuseport", 0),
    # A client whose machine or network is gone says nothing; without pings its stream would hold its adapter for ever.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients may keep a channel alive in the same way, idle or not: a ping every 10 s is not an attack.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


class GrpcServer:
    """Owns the server between :meth:`start` and :meth:`stop`. Health says NOT_SERVING until told otherwise."""

    def __init__(
        self, service: ServingService, *, stalled_reader_seconds: float = faces.STALLED_READER_SECONDS
    ) -> None:
        interceptor = CallInterceptor(_SERVICES, stalled_reader_seconds)
        self._server = grpc.aio.server(interceptors=[interceptor], options=_OPTIONS)
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
