"""The ``capo.v1.Adapters`` service."""

from __future__ import annotations

import grpc

from capo_proto.v1 import adapters_pb2 as pb
from capo_proto.v1 import adapters_pb2_grpc as stubs
from registry import Alias, CanaryRequest, errors
from registry.principal import current_principal
from serve.pins import Pin, PinState
from serve.resident import AdapterState
from serve.service import ServingService

_STATES = {
    AdapterState.AVAILABLE: pb.ADAPTER_STATE_AVAILABLE,
    AdapterState.LOADING: pb.ADAPTER_STATE_LOADING,
    AdapterState.LOADED: pb.ADAPTER_STATE_LOADED,
    AdapterState.DRAINING: pb.ADAPTER_STATE_DRAINING,
    AdapterState.REFUSED: pb.ADAPTER_STATE_REFUSED,
}

_PIN_STATES = {
    PinState.HELD: pb.PIN_STATE_HELD,
    PinState.LOADING: pb.PIN_STATE_LOADING,
    PinState.REFUSED: pb.PIN_STATE_REFUSED,
    PinState.MISSING: pb.PIN_STATE_MISSING,
    PinState.NO_ROOM: pb.PIN_STATE_NO_ROOM,
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
                aliases=view.aliases,
                canary_of=view.canary_of,
                rank=manifest.lora.rank if manifest.lora is not None else 0,
                created_at=manifest.created_at,
                requests_in_flight=status.resident.users if status.resident is not None else 0,
                pinned=status.is_pinned,
                notes=status.notes,
                **_reason(status.reason),
            )
        for damaged in self._service.damaged_adapters():
            response.adapters.add(
                name=damaged.name,
                revision=damaged.revision,
                state=pb.ADAPTER_STATE_REFUSED,
                **_reason(damaged.error),
            )
        return response

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: grpc.aio.ServicerContext) -> pb.Pin:
        return _pin(await self._service.pin(request.reference))

    async def UnpinAdapter(
        self, request: pb.UnpinAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnpinAdapterResponse:
        self._service.pins.remove(request.reference, principal=current_principal())
        return pb.UnpinAdapterResponse()

    async def ListPins(self, request: pb.ListPinsRequest, context: grpc.aio.ServicerContext) -> pb.ListPinsResponse:
        return pb.ListPinsResponse(pins=[_pin(pin) for pin in self._service.pins.seen_by(current_principal())])

    async def ListAliases(
        self, request: pb.ListAliasesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAliasesResponse:
        aliases = self._service.catalog.snapshot.aliases_of(current_principal())
        return pb.ListAliasesResponse(aliases=[_alias(alias) for alias in aliases])

    async def GetAlias(self, request: pb.GetAliasRequest, context: grpc.aio.ServicerContext) -> pb.Alias:
        return _alias_with_history(await self._service.aliases.get(request.alias))

    async def SetAlias(self, request: pb.SetAliasRequest, context: grpc.aio.ServicerContext) -> pb.Alias:
        has_canary = request.HasField("canary")
        canary = CanaryRequest(request.canary.revision, request.canary.percent) if has_canary else None
        flip = await self._service.aliases.set(
            request.alias, request.revision, canary=canary, expected=request.expected or None
        )
        answer = _alias_with_history(flip.alias)
        answer.warmed = flip.is_warm
        return answer

    async def RollbackAlias(self, request: pb.RollbackAliasRequest, context: grpc.aio.ServicerContext) -> pb.Alias:
        return _alias_with_history(await self._service.aliases.roll_back(request.alias))

    async def RemoveAlias(
        self, request: pb.RemoveAliasRequest, context: grpc.aio.ServicerContext
    ) -> pb.RemoveAliasResponse:
        await self._service.aliases.remove(request.alias)
        return pb.RemoveAliasResponse()


def _reason(error: errors.CapoError | None) -> dict[str, str]:
    return {} if error is None else {"reason_code": error.code, "reason": error.message}


def _pin(pin: Pin) -> pb.Pin:
    return pb.Pin(reference=pin.reference, state=_PIN_STATES[pin.state], revisions=pin.revisions, **_reason(pin.reason))


def _alias(alias: Alias) -> pb.Alias:
    canary = alias.canary
    return pb.Alias(
        alias=alias.alias,
        revision=alias.revision,
        write_once=alias.write_once,
        updated_at=alias.updated_at,
        canary=None if canary is None else pb.Canary(revision=canary.revision, percent=canary.percent),
    )


def _alias_with_history(alias: Alias) -> pb.Alias:
    answer = _alias(alias)
    for entry in alias.history:
        answer.history.add(revision=entry.revision, at=entry.at)
    return answer
