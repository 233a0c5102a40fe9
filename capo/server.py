"""``capo serve``: one process that serves and takes jobs, with training in worker processes beside it.

Start-up order matters. The environment is copied before vLLM changes it (its CPU platform sets LD_PRELOAD and thread
variables that training must not inherit); the fork server starts before the imports of this process, so that both load
at once; HTTP listens at once and says 503 until the engine answers; training workers start when the engine is up, so
that they do not compete with it for the cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import uvicorn
from fastapi import APIRouter

from capo.app import build_app
from capo.settings import Settings
from capo.workers import LocalWorkers
from registry import BaseModel, Registry, errors, locate_base_model
from serve.adapter_imports import AdapterImports
from serve.catalog import Catalog
from serve.engine_arguments import Choice, max_lora_rank
from serve.engine_arguments import choose as choose_engine_arguments
from serve.gate import Gate
from serve.grpc import GrpcServer
from serve.import_folder import ImportFolder
from serve.limits import Limits
from serve.metrics import Metrics
from serve.pool import AdapterPool
from serve.routes import adapters_router, inference_router, models_router, vllm_adapters_router
from serve.service import ServingService
from tune.jobs.database import Database
from tune.jobs.file_store import FileStore
from tune.jobs.files import FileService, FileStorage
from tune.jobs.routes import files_router, fine_tuning_router
from tune.jobs.service import JobService
from tune.jobs.settings import files_dir
from tune.jobs.store import JobStore

logger = logging.getLogger(__name__)

_HEALTH_SECONDS = 0.2
# After the drain: for connections that are still open because their client does not read or finish an upload.
_CLOSE_SECONDS = 3


@dataclass(frozen=True, slots=True)
class StartupReport:
    """What the operator is told once the service is ready."""

    url: str
    grpc_address: str
    start_seconds: float
    choices: list[Choice]


@dataclass(frozen=True, slots=True)
class _Faces:
    http: asyncio.Task[None]
    url: str
    grpc: GrpcServer
    grpc_address: str


class CapoServer:
    """One service, from settings to a clean end.

    ``on_ready`` is called once, on the event loop, when the first request can be answered.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        vllm_arguments: list[str],
        clean_environment: dict[str, str],
        started_at: float,
    ) -> None:
        self._settings = settings
        self._started_at = started_at
        self._vllm_arguments = vllm_arguments
        self._is_stopping = asyncio.Event()
        self.registry = Registry(settings.registry_path)
        self.base_model = locate_base_model(settings.model, self.registry)
        use_gpu = Path("/dev/nvidiactl").exists()
        self._choices = choose_engine_arguments(self.base_model.path, use_gpu=use_gpu, user_arguments=vllm_arguments)
        self.serving = self._build_serving(
            self.base_model, [*(part for choice in self._choices for part in choice.argv), *vllm_arguments]
        )
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self._database = Database(settings.job_store_url)
        self._workers = LocalWorkers(settings, clean_environment)

    def _build_serving(self, base_model: BaseModel, arguments: list[str]) -> ServingService:
        # Importing the engine costs seconds and must come after serve.engine_process.prepare().
        from serve.engine import VllmEngine

        settings = self._settings
        engine = VllmEngine(str(base_model.path), base_model.id, arguments)
        metrics = Metrics(max_adapters=settings.max_metric_adapters)
        pool = AdapterPool(
            engine, Gate(self.registry, base_model), metrics, max_wait_seconds=settings.adapter_wait_seconds
        )
        catalog = Catalog(self.registry, base_model.id)
        limits = Limits(
            max_in_flight=settings.max_in_flight,
            max_in_flight_per_model=settings.max_in_flight_per_model,
            engine_stall_seconds=settings.engine_stall_seconds,
            alias_warm_seconds=settings.alias_warm_seconds,
        )
        return ServingService(
            engine=engine, catalog=catalog, pool=pool, metrics=metrics, limits=limits, pins=settings.pin
        )

    def _routers(self) -> list[APIRouter]:
        files = FileStore(self._database)
        storage = FileStorage(files_dir(self._settings.data_dir))
        file_service = FileService(files, storage)
        file_service.sweep()  # what an upload left behind that was cut off by a crash
        import_dir = self._settings.import_dir
        import_folder = ImportFolder(import_dir) if import_dir is not None else None
        jobs = JobService(
            JobStore(self._database, organization=self._settings.organization),
            files,
            self.registry,
            base_models={self.base_model.id: self._settings.model},
            max_lora_rank=max_lora_rank(self._vllm_arguments),
        )
        return [
            inference_router(self.serving),
            models_router(self.serving),
            adapters_router(self.serving),
            vllm_adapters_router(AdapterImports(self.serving, self.base_model, import_folder)),
            files_router(file_service),
            fine_tuning_router(jobs),
        ]

    async def run(self, on_ready: Callable[[StartupReport], None]) -> None:
        """Serve until SIGTERM or SIGINT; a second one ends at once. Returns after a drain."""
        self._install_signal_handlers()
        try:
            async with self._faces() as faces:
                await self._serve(faces, on_ready)
        finally:
            self._database.close()

    async def _serve(self, faces: _Faces, on_ready: Callable[[StartupReport], None]) -> None:
        stopping = asyncio.create_task(self._is_stopping.wait(), name="stop-signal")
        start = asyncio.create_task(self.serving.start(), name="serving-start")
        await asyncio.wait((start, stopping, faces.http), return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            logger.info("ended before the engine was up")
            # Nothing was served yet, and the thread that builds the engine cannot be stopped.
            self._end_now(0)
        start.result()
        self._workers.start()
        watchers = [
            asyncio.create_task(self._workers.watch(), name="workers"),
            asyncio.create_task(self._follow_readiness(faces.grpc), name="grpc-health"),
        ]
        start_seconds = time.monotonic() - self._started_at
        on_ready(StartupReport(faces.url, faces.grpc_address, start_seconds, self._choices))
        try:
            await asyncio.wait((stopping, faces.http), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await self._drain(faces.grpc)

    async def _follow_readiness(self, grpc_server: GrpcServer) -> None:
        """Keep the gRPC health service true through engine restarts."""
        was_ready = False
        while True:
            is_ready = self.serving.not_ready_reason() is None
            if is_ready != was_ready:
                await grpc_server.set_serving(is_ready)
                was_ready = is_ready
            await asyncio.sleep(_HEALTH_SECONDS)

    @contextlib.asynccontextmanager
    async def _faces(self) -> AsyncIterator[_Faces]:
        """HTTP and gRPC, listening. Both end when the block does, so the block must drain first."""
        settings = self._settings
        app = build_app(self._routers(), self.serving.not_ready_reason, self.serving.engine.body_schema)
        listener = _listen(settings.host, settings.port)
        grpc_server = GrpcServer(self.serving)
        grpc_port = await grpc_server.start(settings.host, settings.grpc_port)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
        server = _Server(config)
        http = asyncio.create_task(server.serve(sockets=[listener]), name="http")
        url = f"http://{settings.host}:{listener.getsockname()[1]}"
        try:
            yield _Faces(http=http, url=url, grpc=grpc_server, grpc_address=f"{settings.host}:{grpc_port}")
        finally:
            await grpc_server.stop()
            server.should_exit = True
            await http

    async def _drain(self, grpc_server: GrpcServer) -> None:
        # Load balancers must hear of it before the first refusal.
        await grpc_server.set_serving(False)
        left, _ = await asyncio.gather(self.serving.drain(self._settings.drain_seconds), self._workers.stop())
        if left:
            logger.warning("%d requests were still running at the drain deadline", left)
        # Stopping the engine ends what is left with an error event, so that no cut stream looks complete.
        await self.serving.stop()

    def _end_now(self, code: int) -> NoReturn:
        """Without waiting for anything; the fork server and the engine end with us."""
        self._workers.kill()
        os._exit(code)

    def _install_signal_handlers(self) -> None:
        loop = asyncio.get_running_loop()

        def stop(name: str) -> None:
            if self._is_stopping.is_set():
                logger.warning("second %s: ending now", name)
                self._end_now(130)
            logger.info("%s: draining", name)
            self._is_stopping.set()

        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stop, signum.name)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: this process drains before HTTP stops."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is one clear error before the engine starts, and port 0 is known."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise errors.UnavailableError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another --port, or 0 for a free one."
        ) from error
    return listener
