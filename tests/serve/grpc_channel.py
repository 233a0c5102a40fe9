"""A gRPC server over a serving application, and a channel to it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx

from capo_proto.v1 import inference_pb2, inference_pb2_grpc
from registry.principal import Principal
from serve.access import OneTenant
from serve.engine_api import Engine
from serve.grpc import GrpcServer
from serve.service import ServingService
from tests.serve.running import TENANT, running_service


@dataclass(frozen=True)
class Faces:
    """One service behind both faces."""

    http: httpx.AsyncClient
    channel: grpc.aio.Channel
    server: GrpcServer
    service: ServingService
    address: str

    @property
    def inference(self) -> inference_pb2_grpc.InferenceStub:
        return inference_pb2_grpc.InferenceStub(self.channel)


@contextlib.asynccontextmanager
async def both_faces(
    engine: Engine, registry_dir: Path, *, stalled_reader_seconds: float = 60, **limits: float
) -> AsyncIterator[Faces]:
    async with running_service(engine, registry_dir, **limits) as (http, service):
        server = GrpcServer(
            service, access=OneTenant(Principal.local(TENANT)), stalled_reader_seconds=stalled_reader_seconds
        )
        address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
        await server.set_serving(True)
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                yield Faces(http, channel, server, service, address)
        finally:
            await server.stop()


def chat(model: str, **fields: object) -> inference_pb2.ChatRequest:
    message = inference_pb2.Message(role="user", content="hello")
    return inference_pb2.ChatRequest(model=model, messages=[message], **fields)
