"""Every route and every RPC of the table against everybody who must not come in, and those who may."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from capo.access_rules import GRPC_RULES, HTTP_RULES, RULES, Rule
from capo.app import build_app
from capo.control_side import control_routers
from capo.keys.records import NewKey
from capo.keys.secret import new_secret
from capo.keys.store import KeyStore
from registry.principal import Scope
from serve.names_service import NamesService
from tests.capo.guarded import EVERY_SCOPE, Answer, Guarded, bearer, guarded, within
from tests.serve.running import NoGate
from tune.jobs.database import Database, sqlite_url

GUARDED = {operation: rule for operation, rule in RULES.items() if not rule.is_public}
REFUSED_401 = {401, "UNAUTHENTICATED"}
REFUSED_403 = {403, "PERMISSION_DENIED"}


async def answers(service: Guarded, key: str | None, rules: dict[str, Rule] | None = None) -> dict[str, Answer]:
    return {operation: await service.ask(operation, key) for operation in (rules or RULES)}


def was_let_in(answer: Answer) -> bool:
    """Past the door: whatever the handler then thought of an empty request."""
    return answer.status not in REFUSED_401 and answer.code not in ("missing_scope", "not_in_the_rules")


def refused_as(found: dict[str, Answer], statuses: set[object], code: str) -> dict[str, object]:
    """The operations that were not refused like this; empty is good."""
    return {
        operation: (answer.status, answer.code)
        for operation, answer in found.items()
        if answer.status not in statuses or answer.code != code
    }


async def test_without_a_key_only_the_public_ones_answer(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        service.key()
        found = await answers(service, None)
    public = {operation: found.pop(operation) for operation, rule in RULES.items() if rule.is_public}
    assert sorted(public) == [
        "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List", "/grpc.health.v1.Health/Watch",
        "GET /livez", "GET /readyz", "GET /startupz",
    ]  # fmt: skip
    assert all(was_let_in(answer) for answer in public.values())
    assert refused_as(found, REFUSED_401, "invalid_api_key") == {}


async def test_a_wrong_key_opens_nothing(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = service.key()
        wrong = {
            "unknown id": bearer(new_secret()),
            "wrong secret": bearer(new_secret(key.key_id)),
            "no key at all": "Bearer sk-live-0123456789",
            "another scheme": f"Basic {key.text}",
            "key alone": key.text,
        }
        for what, shown in wrong.items():
            found = await answers(service, shown, GUARDED)
            assert refused_as(found, REFUSED_401, "invalid_api_key") == {}, what


async def test_a_key_without_the_scope_opens_nothing(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        by_scopes = {}
        found = {}
        for operation, rule in GUARDED.items():
            if rest := EVERY_SCOPE - rule.scopes:
                key = by_scopes.setdefault(rest, bearer(service.key(scopes=rest)))
                found[operation] = await service.ask(operation, key)
    assert len(found) > 60
    assert refused_as(found, REFUSED_403, "missing_scope") == {}


async def test_each_scope_that_the_table_names_is_enough(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        keys = {scope: bearer(service.key(scopes=frozenset({scope}))) for scope in Scope}
        shut = [
            (operation, scope)
            for operation, rule in GUARDED.items()
            for scope in rule.scopes
            if not was_let_in(await service.ask(operation, keys[scope]))
        ]
    assert shut == []


async def test_a_revoked_key_is_refused_everywhere_within_five_seconds_and_without_a_restart(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = service.key()
        assert all(was_let_in(answer) for answer in (await answers(service, bearer(key), GUARDED)).values())
        another_process = Database(sqlite_url(tmp_path / "jobs.sqlite"))
        KeyStore(another_process).revoke(key.key_id)
        another_process.close()

        async def is_refused() -> bool:
            return (await service.ask("GET /v1/models", bearer(key))).status == 401

        seconds = await within(5, is_refused)
        found = await answers(service, bearer(key), GUARDED)
    assert refused_as(found, REFUSED_401, "invalid_api_key") == {}, f"{seconds:.1f} s"


async def test_an_expired_key_is_refused_everywhere(tmp_path: Path) -> None:
    now = 1_000_000.0
    async with guarded(tmp_path) as service:
        secret = KeyStore(service.database, clock=lambda: now).create(
            NewKey("acme", EVERY_SCOPE, expires_at=int(now) + 60)
        )
        service.ring.read()
        found = await answers(service, bearer(secret), GUARDED)
    assert refused_as(found, REFUSED_401, "invalid_api_key") == {}


async def test_what_is_served_is_in_the_table_and_what_is_in_the_table_is_served(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        http = {
            f"{method} {route.path}" for route in service.app.routes for method in getattr(route, "methods", None) or ()
        }
        rpcs = await reflected(service)
    assert http == set(HTTP_RULES) | {"HEAD /openapi.json"} & http
    assert rpcs == set(GRPC_RULES)


async def test_what_a_process_without_an_engine_serves_is_in_the_table(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        names = NamesService(service.service.catalog, NoGate(), service.engine.limits)
        app = build_app(control_routers(service.tuning, names), names.not_ready_reason, access=service.door)
        http = {f"{method} {route.path}" for route in app.routes for method in getattr(route, "methods", None) or ()}
    assert http - set(HTTP_RULES) <= {"HEAD /openapi.json"}
    assert {"PUT /v1/aliases/{alias:path}", "POST /v1/fine_tuning/jobs"} <= http


async def test_a_route_that_is_not_in_the_table_is_refused_even_with_every_right(tmp_path: Path) -> None:
    router = APIRouter()

    @router.get("/v1/new")
    async def new() -> str:
        return "nobody thought of a scope"

    async with guarded(tmp_path, extra_routers=(router,)) as service:
        open_to_all = await service.ask("GET /v1/new", None)
        answer = await service.ask("GET /v1/new", bearer(service.key()))
    assert (open_to_all.status, open_to_all.code) == (403, "not_in_the_rules")
    assert (answer.status, answer.code) == (403, "not_in_the_rules")


OF_VLLM = (
    "/invocations", "/pooling", "/score", "/pause", "/update_weights", "/sleep", "/collective_rpc", "/server_info",
    "/reset_prefix_cache", "/v1/audio/transcriptions", "/v1/embeddings", "/load", "/version", "/ping",
)  # fmt: skip


async def test_routes_of_vllm_are_not_there(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = bearer(service.key())
        asked = [f"{method} {path}" for path in OF_VLLM for method in ("GET", "POST")]
        found = {operation: (await service.ask(operation, key)).status for operation in asked}
    assert {operation: status for operation, status in found.items() if status not in (404, 405)} == {}


async def test_without_any_key_everything_is_open_to_this_machine_as_before(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        with_none = await answers(service, None, GUARDED)
        with_some = await answers(service, "Bearer unused", GUARDED)
    assert [operation for operation, answer in (with_none | with_some).items() if not was_let_in(answer)] == []


async def reflected(service: Guarded) -> set[str]:
    """Every method that the gRPC server says it has."""
    stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)

    async def ask(**request: str) -> reflection_pb2.ServerReflectionResponse:
        replies = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)]))
        return next(iter([reply async for reply in replies]))

    methods = set()
    listed = await ask(list_services="")
    for service_entry in listed.list_services_response.service:
        found = await ask(file_containing_symbol=service_entry.name)
        for raw in found.file_descriptor_response.file_descriptor_proto:
            file = FileDescriptorProto.FromString(raw)
            for described in file.service:
                full_name = f"{file.package}.{described.name}"
                if full_name == service_entry.name:
                    methods |= {f"/{full_name}/{method.name}" for method in described.method}
    return methods
