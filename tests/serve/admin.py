"""The admin calls over both faces, as one client that gives and takes the same plain values."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from google.protobuf.json_format import MessageToDict

from capo_proto.v1 import adapters_pb2 as pb
from capo_proto.v1 import adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from registry.principal import Principal
from serve.access import OneTenant
from serve.engine_api import Engine
from serve.grpc import GrpcServer
from serve.service import ServingService
from tests.serve.running import TENANT, running_service

_GRPC_OF_HTTP = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 409: "FAILED_PRECONDITION", 503: "UNAVAILABLE"}


@dataclass
class Refused(Exception):
    """A refusal: HTTP's status (gRPC's translated) and our code."""

    status: int
    code: str
    message: str


class Admin(ABC):
    service: ServingService

    @abstractmethod
    async def ask(self, model: str, user: str | None = None) -> str:
        """The model that the answer names."""

    @abstractmethod
    async def aliases(self) -> list[dict[str, Any]]: ...

    @abstractmethod
    async def alias(self, alias: str) -> dict[str, Any]: ...

    @abstractmethod
    async def set_alias(self, alias: str, revision: str, **fields: Any) -> dict[str, Any]:
        """``canary``: (revision, percent); ``expected``: a revision."""

    @abstractmethod
    async def roll_back(self, alias: str) -> dict[str, Any]: ...

    @abstractmethod
    async def remove_alias(self, alias: str) -> None: ...

    @abstractmethod
    async def adapters(self) -> dict[str, dict[str, Any]]:
        """By revision."""

    @abstractmethod
    async def pin(self, reference: str) -> dict[str, Any]: ...

    @abstractmethod
    async def unpin(self, reference: str) -> None: ...

    @abstractmethod
    async def pins(self) -> list[dict[str, Any]]: ...


class HttpAdmin(Admin):
    def __init__(self, client: httpx.AsyncClient, service: ServingService) -> None:
        self._client = client
        self.service = service

    async def _call(self, method: str, path: str, **options: Any) -> Any:
        response = await self._client.request(method, path, **options)
        if response.status_code != 200:
            error = response.json()["error"]
            raise Refused(response.status_code, error["code"], error["message"])
        return response.json()

    async def ask(self, model: str, user: str | None = None) -> str:
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        if user is not None:
            body["user"] = user
        return str((await self._call("POST", "/v1/chat/completions", json=body))["model"])

    async def aliases(self) -> list[dict[str, Any]]:
        return list((await self._call("GET", "/v1/aliases"))["data"])

    async def alias(self, alias: str) -> dict[str, Any]:
        return dict(await self._call("GET", f"/v1/aliases/{alias}"))

    async def set_alias(self, alias: str, revision: str, **fields: Any) -> dict[str, Any]:
        if "canary" in fields:
            fields["canary"] = dict(zip(("revision", "percent"), fields["canary"], strict=True))
        return dict(await self._call("PUT", f"/v1/aliases/{alias}", json={"revision": revision, **fields}))

    async def roll_back(self, alias: str) -> dict[str, Any]:
        return dict(await self._call("POST", f"/v1/aliases/{alias}/rollback"))

    async def remove_alias(self, alias: str) -> None:
        assert await self._call("DELETE", f"/v1/aliases/{alias}") == {
            "object": "alias",
            "alias": alias,
            "deleted": True,
        }

    async def adapters(self) -> dict[str, dict[str, Any]]:
        return {adapter["revision"]: adapter for adapter in (await self._call("GET", "/v1/adapters"))["data"]}

    async def pin(self, reference: str) -> dict[str, Any]:
        return dict(await self._call("PUT", f"/v1/adapters/{reference}/pin"))

    async def unpin(self, reference: str) -> None:
        assert (await self._call("DELETE", f"/v1/adapters/{reference}/pin"))["deleted"] is True

    async def pins(self) -> list[dict[str, Any]]:
        return list((await self._call("GET", "/v1/pins"))["data"])


class GrpcAdmin(Admin):
    def __init__(self, channel: grpc.aio.Channel, service: ServingService) -> None:
        self._stub = adapters_pb2_grpc.AdaptersStub(channel)
        self._inference = inference_pb2_grpc.InferenceStub(channel)
        self.service = service

    async def _call(self, call: Any) -> dict[str, Any]:
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            status = next(http for http, name in _GRPC_OF_HTTP.items() if name == error.code().name)
            trailers = dict(error.trailing_metadata() or ())
            raise Refused(status, str(trailers["capo-error-code"]), error.details() or "") from error
        values = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        return _as_in_json(values)

    async def ask(self, model: str, user: str | None = None) -> str:
        fields = {} if user is None else {"user": user}
        message = inference_pb2.Message(role="user", content="hello")
        answer = await self._call(
            self._inference.Chat(inference_pb2.ChatRequest(model=model, messages=[message], **fields))
        )
        return str(answer["model"])

    async def aliases(self) -> list[dict[str, Any]]:
        return list((await self._call(self._stub.ListAliases(pb.ListAliasesRequest())))["aliases"])

    async def alias(self, alias: str) -> dict[str, Any]:
        return await self._call(self._stub.GetAlias(pb.GetAliasRequest(alias=alias)))

    async def set_alias(self, alias: str, revision: str, **fields: Any) -> dict[str, Any]:
        if "canary" in fields:
            fields["canary"] = pb.Canary(revision=fields["canary"][0], percent=fields["canary"][1])
        return await self._call(self._stub.SetAlias(pb.SetAliasRequest(alias=alias, revision=revision, **fields)))

    async def roll_back(self, alias: str) -> dict[str, Any]:
        return await self._call(self._stub.RollbackAlias(pb.RollbackAliasRequest(alias=alias)))

    async def remove_alias(self, alias: str) -> None:
        await self._call(self._stub.RemoveAlias(pb.RemoveAliasRequest(alias=alias)))

    async def adapters(self) -> dict[str, dict[str, Any]]:
        listed = (await self._call(self._stub.ListAdapters(pb.ListAdaptersRequest())))["adapters"]
        return {adapter["revision"]: adapter for adapter in listed}

    async def pin(self, reference: str) -> dict[str, Any]:
        return await self._call(self._stub.PinAdapter(pb.PinAdapterRequest(reference=reference)))

    async def unpin(self, reference: str) -> None:
        await self._call(self._stub.UnpinAdapter(pb.UnpinAdapterRequest(reference=reference)))

    async def pins(self) -> list[dict[str, Any]]:
        return list((await self._call(self._stub.ListPins(pb.ListPinsRequest())))["pins"])


def _as_in_json(value: Any) -> Any:
    """protobuf's JSON as the HTTP face would say it: enum values in their short form, no message as null."""
    if isinstance(value, dict):
        plain = {key: _as_in_json(inner) for key, inner in value.items()}
        if "write_once" in plain:
            plain.setdefault("canary", None)
        if "reason_code" in plain:
            code, message = plain.pop("reason_code"), plain.pop("reason")
            plain["reason"] = {"code": code, "message": message} if code else None
        return plain
    if isinstance(value, list):
        return [_as_in_json(inner) for inner in value]
    if isinstance(value, str):
        for prefix in ("ADAPTER_STATE_", "PIN_STATE_"):
            if value.startswith(prefix):
                return value.removeprefix(prefix).lower()
    return value


@contextlib.asynccontextmanager
async def admin_of(face: str, engine: Engine, registry_dir: Path, **options: Any) -> AsyncIterator[Admin]:
    """A running service and its admin calls over ``face``: http or grpc."""
    async with running_service(engine, registry_dir, **options) as (client, service):
        if face == "http":
            yield HttpAdmin(client, service)
            return
        server = GrpcServer(service, access=OneTenant(Principal.local(TENANT)))
        port = await server.start("127.0.0.1", 0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield GrpcAdmin(channel, service)
        await server.stop()
