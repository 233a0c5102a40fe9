"""The ``capo.v1.Adapters`` service."""

from __future__ import annotations

import grpc

from capo_proto.v1 import adapters_pb2 as pb
from capo_proto.v1 import adapters_pb2_grpc as stubs
from registry import Alias
from serve.pool import AdapterState
from serve.service import ServingService

_STATES = {
    AdapterState.AVAILABLE: pb.ADAPTER_STATE_AVAILABLE,
    AdapterState.LOADING: pb.ADAPTER_STATE_LOADING,
    AdapterState.LOADED: pb.ADAPTER_STATE_LOADED,
    AdapterState.DRAINING: pb.ADAPTER_STATE_DRAINING,
    AdapterState.REFUSED: pb.ADAPTER_STATE_REFUSED,
}


class AdaptersServicer(stubs.AdaptersServicer):
    """Errors pass through: the server's interceptor turns them into status codes."""

    def __init__(self, service: ServingService) -> None:
        self._service = service

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAdaptersResponse:
        response = pb.ListAdaptersResponse()
        for view in self._service.adapters():
            manifest, status = view.artifact.manifest, view.status
            response.adapters.add(
                name=view.artifact.name,
                revision=view.artifact.revision,
                state=_STATES[status.state],
                reason_code=status.reason.code if status.reason is not None else "",
                reason=status.reason.message if status.reason is not None else "",
                aliases=view.aliases,
                rank=manifest.lora.rank if manifest.lora is not None else 0,
                created_at=manifest.created_at,
                requests_in_flight=status.resident.users if status.resident is not None else 0,
            )
        return response

    async def ListAliases(
        self, request: pb.ListAliasesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAliasesResponse:
        aliases = self._service.catalog.snapshot.aliases
        return pb.ListAliasesResponse(aliases=[_alias(aliases[name]) for name in sorted(aliases)])

    async def SetAlias(self, request: pb.SetAliasRequest, context: grpc.aio.ServicerContext) -> pb.Alias:
        return _alias(await self._service.set_alias(request.alias, request.revision))


def _alias(alias: Alias) -> pb.Alias:
    return pb.Alias(
        alias=alias.alias, revision=alias.revision, write_once=alias.write_once, updated_at=alias.updated_at
    )
