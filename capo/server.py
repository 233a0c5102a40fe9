"""``capo serve``: one process that serves, takes jobs, or both, with local training workers beside it.

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
from functools import partial
from typing import NoReturn

import uvicorn
from fastapi import FastAPI
from prometheus_client import REGISTRY

from capo.access import is_loopback
from capo.access_side import AccessSide
from capo.app import build_app, build_health_app, build_metrics_app
from capo.caches import refuse_shared_caches
from capo.control_side import ControlSide
from capo.disk_metrics import DiskMetrics
from capo.http_protocol import bounded_heads
from capo.inference_side import InferenceSide, open_registry
from capo.settings import Settings
from capo.tls import Tls
from capo.workers import make_launcher
from registry import errors, locate_base_model
from serve.engine_arguments import Choice
from serve.grpc import GrpcServer

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
    """One service, from settings to a clean end."""

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
        self._is_stopping = asyncio.Event()
        if settings.role.has_engine:
            refuse_shared_caches()
        self._tls = Tls.of(settings)
        self._access = AccessSide(settings)
        registry = open_registry(settings)
        base_model = locate_base_model(settings.model, registry)
        role = settings.role
        self._inference: InferenceSide | None = None
        self._control: ControlSide | None = None
        if role.has_engine:
            self._inference = InferenceSide(settings, registry, base_model, vllm_arguments, shares=self._access)
        if role.has_jobs:
            self._control = ControlSide(settings, registry, base_model, vllm_arguments, shares=self._access)
        database = None if self._control is None else self._control.database
        self._launcher = make_launcher(settings, clean_environment, database)
        directories = {"registry": settings.registry_path}
        if role.has_jobs:
            directories["data"] = settings.data_dir
        REGISTRY.register(DiskMetrics(directories))

    @property
    def _sides(self) -> list[InferenceSide | ControlSide]:
        return [side for side in (self._inference, self._control) if side is not None]

    def _not_ready_reason(self) -> str | None:
        reasons = (side.not_ready_reason() for side in self._sides)
        return next((reason for reason in reasons if reason is not None), None)

    async def run(self, on_ready: Callable[[StartupReport], None]) -> None:
        """Serve until SIGTERM or SIGINT; a second one ends at once. Returns after a drain.

        ``on_ready`` is called once, on the event loop, when the first request can be answered.
        """
        self._install_signal_handlers()
        try:
            async with self._faces() as faces:
                await self._serve(faces, on_ready)
        finally:
            for side in self._sides:
                side.close()
            await self._access.stop()

    async def _serve(self, faces: _Faces, on_ready: Callable[[StartupReport], None]) -> None:
        stopping = asyncio.create_task(self._is_stopping.wait(), name="stop-signal")
        start = asyncio.create_task(self._start(), name="serving-start")
        await asyncio.wait((start, stopping, faces.http), return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            logger.info("ended before the engine was up")
            # Nothing was served yet, and the thread that builds the engine cannot be stopped.
            await self._access.stop()
            self._end_now(0)
        start.result()
        self._launcher.start()
        watchers = [
            asyncio.create_task(self._launcher.watch(), name="launcher"),
            asyncio.create_task(self._follow_readiness(faces.grpc), name="grpc-health"),
        ]
        start_seconds = time.monotonic() - self._started_at
        choices = self._inference.choices if self._inference is not None else []
        on_ready(StartupReport(faces.url, faces.grpc_address, start_seconds, choices))
        try:
            await asyncio.wait((stopping, faces.http), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await self._drain(faces.grpc)

    async def _start(self) -> None:
        await asyncio.gather(*(side.start() for side in self._sides))

    async def _follow_readiness(self, grpc_server: GrpcServer) -> None:
        """Keep the gRPC health service true through engine restarts."""
        was_ready = False
        while True:
            is_ready = self._not_ready_reason() is None
            if is_ready != was_ready:
                await grpc_server.set_serving(is_ready)
                was_ready = is_ready
            await asyncio.sleep(_HEALTH_SECONDS)

    @contextlib.asynccontextmanager
    async def _faces(self) -> AsyncIterator[_Faces]:
        """HTTP and gRPC, listening. Both end when the block does, so the block must drain first."""
        settings = self._settings
        inference = self._inference
        routers = [router for side in self._sides for router in side.routers()]
        engine_schema = None if inference is None else inference.serving.engine.body_schema
        app = build_app(
            routers,
            self._not_ready_reason,
            engine_schema,
            access=self._access.door,
            only_this_machine=is_loopback(settings.host) and not settings.allow_unauthenticated,
            serve_metrics=settings.metrics_port is None,
            max_body_bytes=settings.max_body_bytes,
            stalled_reader_seconds=settings.stalled_reader_seconds,
        )
        self._access.start()
        listener = _listen(settings.host, settings.port)
        servers = [(self._http_server(app, self._tls), listener)]
        if settings.metrics_port is not None:
            metrics_app = build_metrics_app(self._access.door)
            servers.append((self._http_server(metrics_app, self._tls), _listen(settings.host, settings.metrics_port)))
        if settings.health_port is not None:
            health_app = build_health_app(self._not_ready_reason, self._access.door)
            servers.append((self._http_server(health_app, None), _listen(settings.host, settings.health_port)))
        grpc_server = GrpcServer(
            None if inference is None else inference.serving,
            access=self._access.door,
            max_message_bytes=settings.max_body_bytes,
            max_metadata_bytes=settings.max_head_bytes,
            stalled_reader_seconds=settings.stalled_reader_seconds,
            others=[] if self._control is None else self._control.grpc_services(),
        )
        credentials = None if self._tls is None else self._tls.grpc_credentials()
        grpc_port = await grpc_server.start(settings.host, settings.grpc_port, credentials)
        grpc_address = server_address(settings.host, grpc_port)
        serving = [asyncio.create_task(server.serve(sockets=[place]), name="http") for server, place in servers]
        scheme = "http" if self._tls is None else "https"
        url = f"{scheme}://{server_address(settings.host, listener.getsockname()[1])}"
        try:
            yield _Faces(http=serving[0], url=url, grpc=grpc_server, grpc_address=grpc_address)
        finally:
            await grpc_server.stop()
            for server, _ in servers:
                server.should_exit = True
            await asyncio.gather(*serving)

    def _http_server(self, app: FastAPI, tls: Tls | None) -> _Server:
        config = uvicorn.Config(
            app,
            http=bounded_heads(partial(self._access.door.count_refusal, "http"), self._settings.max_head_bytes),
            ws="none",
            # Else a pipelined request begins with what was current when the one before it ended.
            reset_contextvars=True,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
            **({} if tls is None else tls.uvicorn_options()),
        )
        return _Server(config)

    async def _drain(self, grpc_server: GrpcServer) -> None:
        # Load balancers must hear of it before the first refusal.
        await grpc_server.set_serving(False)
        deadline_seconds = self._settings.drain_seconds
        drains = [side.drain(deadline_seconds) for side in (*self._sides, self._access)]
        await asyncio.gather(*drains, self._launcher.stop())
        # Stopping the engine ends what is left with an error event, so that no cut stream looks complete.
        for side in self._sides:
            await side.stop()

    def _end_now(self, code: int) -> NoReturn:
        """Without waiting for anything; the fork server and the engine end with us."""
        self._launcher.kill()
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


def server_address(host: str, port: int) -> str:
    """As a URL has them: in brackets what has colons of its own (RFC 3986, section 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is one clear error before the engine starts, and port 0 is known."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        place = server_address(host, port)
        raise errors.UnavailableError(
            f"Cannot listen on {place}: {error.strerror}. Choose another --port, or 0 for a free one."
        ) from error
    return listener
