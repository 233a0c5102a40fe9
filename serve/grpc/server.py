"""The gRPC server: Capo's services, health, reflection, and errors from the one table.

Runs on the same event loop as HTTP, and calls the same service.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from capo_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from registry import errors
from serve import faces
from serve.access import Access
from serve.grpc.adapters import AdaptersServicer
from serve.grpc.inference import InferenceServicer
from serve.grpc.interceptor import CallInterceptor
from serve.grpc.service_entry import ServiceEntry
from serve.service import ServingService

_MEMORY_BOUND = 4
_OPTIONS = (
    # What is beyond our own bounds is refused by the interceptor, which counts it; gRPC's own only bound the memory.
    # Both: above the first gRPC refuses some of the calls, above the second all.
    ("grpc.max_metadata_size", _MEMORY_BOUND * faces.MAX_HEAD_BYTES),
    ("grpc.absolute_max_metadata_size", _MEMORY_BOUND * faces.MAX_HEAD_BYTES),
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
    """Owns the server between :meth:`start` and :meth:`stop`. Health says NOT_SERVING until told otherwise.

    ``service``: what inference and adapters are asked of; ``None`` in a process without an engine. ``others``: services
    of other rooms, which are looked after in the same way. ``access`` decides who may call what.
    """

    def __init__(
        self,
        service: ServingService | None,
        *,
        access: Access,
        others: Sequence[ServiceEntry] = (),
        max_message_bytes: int = faces.MAX_REQUEST_BYTES,
        max_metadata_bytes: int = faces.MAX_HEAD_BYTES,
        stalled_reader_seconds: float = faces.STALLED_READER_SECONDS,
    ) -> None:
        entries = [*([] if service is None else _serving_entries(service)), *others]
        self._names = tuple(entry.full_name for entry in entries)
        interceptor = CallInterceptor(
            self._names,
            access,
            stalled_reader_seconds=stalled_reader_seconds,
            max_metadata_bytes=max_metadata_bytes,
            max_message_bytes=max_message_bytes,
        )
        self._server = grpc.aio.server(
            interceptors=[interceptor], options=(*_OPTIONS, ("grpc.max_receive_message_length", 2 * max_message_bytes))
        )
        self._health = health.aio.HealthServicer()
        for entry in entries:
            entry.add_to(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listen; returns the port, which differs from ``port`` when that is 0. Without ``credentials`` in plain text.

        Raises:
            UnavailableError: the address is taken.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, credentials)
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
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self) -> None:
        """End at once; the caller has drained."""
        await self._server.stop(grace=None)


def _serving_entries(service: ServingService) -> list[ServiceEntry]:
    inference, adapters = InferenceServicer(service), AdaptersServicer(service)
    return [
        ServiceEntry(
            inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
            lambda server: inference_pb2_grpc.add_InferenceServicer_to_server(inference, server),
        ),
        ServiceEntry(
            adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].full_name,
            lambda server: adapters_pb2_grpc.add_AdaptersServicer_to_server(adapters, server),
        ),
    ]
