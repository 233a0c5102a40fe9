"""A whole service behind its door, on real sockets: both faces, the jobs API, a fake engine, and keys in a database."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import uvicorn
from prometheus_client import CollectorRegistry

from capo.access import AccessMetrics, Door
from capo.app import build_app
from capo.audit import AuditLog, AuditWriter
from capo.control_side import control_grpc_services, control_routers
from capo.http_protocol import bounded_heads
from capo.inference_side import inference_routers
from capo.keys.records import NewKey
from capo.keys.ring import KeyRing
from capo.keys.secret import Secret
from capo.keys.store import KeyStore
from capo.settings import Settings
from capo.tls import Tls
from registry import Artifact, Registry
from registry.principal import Principal, Scope
from serve.access import Access
from serve.adapter_imports import AdapterImports
from serve.catalog import Catalog
from serve.grpc import GrpcServer
from serve.import_folder import ImportFolder
from serve.limits import Limits
from serve.metrics import Metrics
from serve.pool import AdapterPool
from serve.service import ServingService
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import BASE, NoGate, eventually, publish
from tune.jobs.api import TuningApi
from tune.jobs.database import Database, sqlite_url
from tune.jobs.files import FileStorage
from tune.jobs.permissions.store import PermissionStore
from tune.jobs.settings import files_dir

HOUSE = "house"
"""The service's own tenant."""
EVERY_SCOPE = frozenset(Scope)


@dataclass
class Answer:
    """What came back, of either face: an HTTP status, or a gRPC code's name."""

    status: int | str
    code: str | None = None
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Guarded:
    directory: Path
    app: Any
    door: Access
    service: ServingService
    engine: FakeEngine
    registry: Registry
    tuning: TuningApi
    database: Database
    keys: KeyStore
    ring: KeyRing
    metrics: CollectorRegistry
    http: httpx.AsyncClient
    channel: grpc.aio.Channel
    port: int
    grpc_port: int

    def key(self, tenant: str = "acme", scopes: frozenset[Scope] = EVERY_SCOPE, **options: Any) -> Secret:
        """A new key, which the service knows at once."""
        secret = self.keys.create(NewKey(tenant, scopes, **options))
        self.ring.read()
        return secret

    def publish(self, name: str, tenant: str | None, **options: Any) -> Artifact:
        """An adapter of a tenant, or one that all share."""
        owner = self.registry if tenant is None else self.registry.on_behalf_of(Principal(tenant, None, frozenset()))
        return publish(owner, name, content=f"weights of {tenant}", **options)

    async def ask(self, operation: str, key: str | None, *, path: str | None = None, **options: Any) -> Answer:
        """One request of an operation as the rules name it, with empty hands unless told otherwise."""
        if operation.startswith("/"):
            return await self._call(operation, key, **options)
        method, _, template = operation.partition(" ")
        headers = options.pop("headers", {}) | ({} if key is None else {"Authorization": key})
        response = await self.http.request(method, path or filled(template), headers=headers, **options)
        is_json = response.headers.get("content-type") == "application/json" and method != "HEAD"
        body = response.json() if is_json else response.text
        code = body["error"]["code"] if response.is_error and isinstance(body, dict) else None
        return Answer(response.status_code, code, body, dict(response.headers))

    async def _call(self, method: str, key: str | None, message: bytes = b"") -> Answer:
        """Any kind of method: the wire knows only messages, and the first one is enough."""
        metadata = () if key is None else (("authorization", key),)
        call = self.channel.stream_stream(method)(iter([message]), metadata=metadata, timeout=30)
        try:
            first = await call.read()
            code = grpc.StatusCode.OK if first is not grpc.aio.EOF else await call.code()
            details = "" if code is grpc.StatusCode.OK else await call.details()
        except grpc.aio.AioRpcError as error:
            first, code, details = None, error.code(), error.details()
        trailers = {}
        if code is not grpc.StatusCode.OK:
            trailers = {str(name): str(value) for name, value in await call.trailing_metadata()}
        else:
            call.cancel()
        return Answer(code.name, trailers.get("capo-error-code"), first if first is not None else details, trailers)


@dataclass
class KeptShares:
    """As the access side of a service asks the store."""

    store: PermissionStore
    num_lists: int = 0

    async def is_shared_with(self, model: str, tenant: str) -> bool:
        return await asyncio.to_thread(self.store.is_shared_with, model, tenant)

    async def shared_with(self, tenant: str) -> Collection[str]:
        self.num_lists += 1
        return await asyncio.to_thread(self.store.shared_with, tenant)


def bearer(secret: Secret) -> str:
    return f"Bearer {secret.text}"


def filled(template: str, **values: str) -> str:
    """The path of a route with something in its places."""
    path = template.replace(":path}", "}")
    while "{" in path:
        name = path[path.index("{") + 1 : path.index("}")]
        path = path.replace(f"{{{name}}}", values.get(name, f"no-such-{name.replace('_', '-')}"))
    return path


@contextlib.asynccontextmanager
async def guarded(
    directory: Path,
    *,
    access: Access | None = None,
    tls: Tls | None = None,
    extra_routers: tuple[Any, ...] = (),
    limits: Limits | None = None,
    stalled_reader_seconds: float = 60.0,
) -> AsyncIterator[Guarded]:
    """Everything but the engine is what ``capo serve`` composes."""
    engine, prometheus = FakeEngine(), CollectorRegistry()
    database = Database(sqlite_url(directory / "jobs.sqlite"), tenant=HOUSE)
    keys = KeyStore(database)
    ring = KeyRing(keys)
    ring.read()
    audit = AuditWriter(AuditLog(directory))
    own_door = Door(ring, house=HOUSE, metrics=AccessMetrics(prometheus), audit=audit)
    door = access or own_door
    registry = Registry(directory / "registry")
    metrics = Metrics(prometheus, max_adapters=Settings().max_metric_adapters)
    tuning = TuningApi(
        database, FileStorage(files_dir(directory)), registry, base_models={BASE: BASE}, max_lora_rank=16
    )
    catalog = Catalog(registry, BASE, poll_seconds=0.05, shares=KeptShares(tuning.permissions))
    pool = AdapterPool(engine, NoGate(), metrics)
    service = ServingService(engine=engine, catalog=catalog, pool=pool, metrics=metrics, limits=limits)
    (directory / "imports").mkdir(exist_ok=True)
    imports = AdapterImports(service, None, ImportFolder(directory / "imports"))
    routers = [*inference_routers(service, imports), *control_routers(tuning, None), *extra_routers]
    app = build_app(
        routers,
        service.not_ready_reason,
        engine.body_schema,
        access=door,
        only_this_machine=True,
        metrics=prometheus,
        stalled_reader_seconds=stalled_reader_seconds,
    )
    options = {} if tls is None else tls.uvicorn_options()
    config = uvicorn.Config(
        app,
        port=0,
        log_config=None,
        lifespan="off",
        http=bounded_heads(partial(own_door.count_refusal, "http")),
        reset_contextvars=True,
        **options,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    grpc_server = GrpcServer(
        service,
        access=door,
        others=control_grpc_services(tuning),
        stalled_reader_seconds=stalled_reader_seconds,
    )
    grpc_port = await grpc_server.start("127.0.0.1", 0, None if tls is None else tls.grpc_credentials())
    tasks = [asyncio.create_task(server.serve()), asyncio.create_task(ring.follow())]
    try:
        await service.start()
        await eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http,
            grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel,
        ):
            yield Guarded(
                directory=directory,
                app=app,
                door=door,
                service=service,
                engine=engine,
                registry=registry,
                tuning=tuning,
                database=database,
                keys=keys,
                ring=ring,
                metrics=prometheus,
                http=http,
                channel=channel,
                port=port,
                grpc_port=grpc_port,
            )
    finally:
        tasks[1].cancel()
        server.should_exit = True
        await asyncio.gather(*tasks, return_exceptions=True)
        await grpc_server.stop()
        await service.stop()
        database.close()
        audit.close()


async def within(seconds: float, condition: Any) -> float:
    """Wait until the awaitable ``condition()`` is true; how long it took. Fails when it takes longer than allowed."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.05)
    return time.monotonic() - began
