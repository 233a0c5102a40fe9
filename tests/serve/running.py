"""A serving application on a real loopback socket, over a real registry and an engine of the test's choice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from prometheus_client import CollectorRegistry

from capo.app import build_app
from registry import Artifact, BaseModel, BaseModelIdentity, LoraShape, ManifestDraft, Registry
from registry.principal import Principal, acting_as
from serve.access import OneTenant
from serve.adapter_imports import AdapterImports
from serve.catalog import Catalog
from serve.engine_api import Engine
from serve.import_folder import ImportFolder
from serve.limits import Limits
from serve.metrics import Metrics
from serve.pool import AdapterPool
from serve.routes import adapters_router, inference_router, models_router, vllm_adapters_router
from serve.service import ServingService

BASE = "capo-tiny"
TENANT = "capo"


class NoGate:
    """Lets everything through: the gate has tests of its own."""

    async def check(self, artifact: Any, limits: Any) -> None: ...

    async def require_there(self, artifact: Any) -> None: ...

    async def probe(self, artifact: Any, engine: Any, adapter: Any) -> float | None: ...

    def notes(self, revision: str) -> tuple[str, ...]:
        return ()

    def forget(self, revision: str) -> None: ...


def publish(registry: Registry, name: str, content: str = "weights", **options: Any) -> Artifact:
    """An artifact of kind lora whose bytes are ``content``; enough for everything but the gate."""
    with registry.stage() as folder:
        (folder / "adapter_model.safetensors").write_text(content)
        draft = ManifestDraft(
            kind="lora",
            name=name,
            base_model=BaseModelIdentity(id=BASE),
            lora=LoraShape(rank=4, alpha=8, target_modules=["q_proj"]),
            dtype="float32",
        )
        return registry.publish(folder, draft, **options)


async def eventually(condition: Callable[[], bool], seconds: float = 2) -> None:
    """Wait until ``condition`` holds, at most so long."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running_service(
    engine: Engine,
    registry_dir: Path,
    *,
    gate: Any = None,
    pins: Sequence[str] = (),
    import_dir: Path | None = None,
    base_model: BaseModel | None = None,
    read_only: bool = False,
    **limits: float,
) -> AsyncIterator[tuple[httpx.AsyncClient, ServingService]]:
    """A client for a started service. Not started: pass an engine whose start blocks, and look at /readyz."""
    metrics = Metrics(CollectorRegistry())
    pool = AdapterPool(engine, gate or NoGate(), metrics)
    service = ServingService(
        engine=engine,
        catalog=Catalog(Registry(registry_dir, read_only=read_only), BASE, poll_seconds=0.05),
        pool=pool,
        metrics=metrics,
        limits=Limits(**limits),  # type: ignore[arg-type]
        pins=pins,
    )
    folder = ImportFolder(import_dir) if import_dir is not None else None
    routers = [
        inference_router(service),
        models_router(service.catalog),
        adapters_router(service),
        vllm_adapters_router(AdapterImports(service, base_model, folder)),
    ]
    app = build_app(routers, service.not_ready_reason, engine.body_schema, access=OneTenant(Principal.local(TENANT)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    http = asyncio.create_task(server.serve())
    try:
        await service.start()
        await eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            # For tests that ask the service itself; what comes over HTTP runs in tasks of its own.
            with acting_as(Principal.local(TENANT)):
                yield client, service
    finally:
        server.should_exit = True
        await http
        await service.stop()
