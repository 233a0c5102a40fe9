"""Inference from a model name to an answer: resolve, hold the adapter, call the engine, measure.

Both faces, HTTP and gRPC, call this and nothing deeper; neither wire format is known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from registry import Alias, Artifact, errors
from serve.catalog import Catalog, Snapshot, Target
from serve.engine_api import Call, Endpoint, Engine, EngineAdapter, Piece
from serve.metrics import Metrics
from serve.pool import AdapterPool, AdapterStatus
from serve.supervisor import Supervisor

logger = logging.getLogger(__name__)

_NOT_READY = {
    "starting": "The service is still starting. Try again shortly.",
    "draining": "The service is shutting down. Try another replica.",
    "engine_dead": "The engine died and is being started again. Try again shortly.",
}


@dataclass(frozen=True, slots=True)
class AdapterView:
    """One adapter as the admin API shows it."""

    artifact: Artifact
    status: AdapterStatus
    aliases: list[str]


class ServingService:
    """The parts of a serving process, composed; owns their background tasks between start and stop."""

    def __init__(
        self,
        *,
        engine: Engine,
        catalog: Catalog,
        pool: AdapterPool,
        metrics: Metrics,
        stall_seconds: float = 30.0,
    ) -> None:
        self.engine = engine
        self.catalog = catalog
        self.pool = pool
        self.metrics = metrics
        self._tasks: list[asyncio.Task[None]] = []
        self._preloads: set[asyncio.Task[None]] = set()
        self._calls: dict[int, Call] = {}
        self.supervisor = Supervisor(engine, pool, metrics, self._calls, stall_seconds=stall_seconds)
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_started = False
        self._is_draining = False
        catalog.on_change(self._follow_registry)

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine, read the registry, and begin to follow it. Returns when requests can be answered."""
        await self.engine.start()
        self._tasks.append(asyncio.create_task(self.pool.run(), name="adapter-pool"))
        await self.catalog.refresh()
        self._tasks.append(asyncio.create_task(self.catalog.watch(), name="registry-watch"))
        self._tasks.append(asyncio.create_task(self.supervisor.run(), name="engine-supervisor"))
        self._is_started = True
        self.metrics.ready.set(1)

    def not_ready_reason(self) -> str | None:
        """Why requests should not come here now; ``None`` when they may."""
        if not self._is_started:
            return "starting"
        if self._is_draining:
            return "draining"
        if self.engine.is_dead or self.supervisor.is_restarting:
            return "engine_dead"
        return None

    async def drain(self, deadline_seconds: float) -> int:
        """Refuse new requests and wait for those in flight; returns how many were still running at the deadline."""
        self._is_draining = True
        self.metrics.ready.set(0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_seconds):
                await self._idle.wait()
        return self._in_flight

    async def stop(self) -> None:
        for task in [*self._tasks, *self._preloads]:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks.clear()
        await self.engine.stop(timeout_seconds=5)

    # -- inference -------------------------------------------------------------------------------------------

    async def complete(
        self, endpoint: Endpoint, body: Mapping[str, Any], *, protocol: str, request_id: str,
        trace_headers: Mapping[str, str],
    ) -> bytes:  # fmt: skip
        """Answer in one piece, as OpenAI's response object in JSON."""
        target = await self._admit(body)
        async with self._hold(target) as adapter:
            call = self._call(endpoint, body, target, adapter, protocol, request_id, trace_headers)
            with self._measure(call, target, protocol):
                return await self.engine.complete(call)

    async def stream(
        self, endpoint: Endpoint, body: Mapping[str, Any], *, protocol: str, request_id: str,
        trace_headers: Mapping[str, str],
    ) -> AsyncIterator[str]:  # fmt: skip
        """Answer as server-sent events. Trouble is raised; only a whole answer ends with ``[DONE]``."""
        target = await self._admit(body)
        async with self._hold(target) as adapter:
            call = self._call(endpoint, body, target, adapter, protocol, request_id, trace_headers)
            with self._measure(call, target, protocol):
                async with contextlib.aclosing(self.engine.stream(call)) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        yield chunk

    async def pieces(
        self,
        endpoint: Endpoint,
        body: Mapping[str, Any],
        *,
        protocol: str,
        request_id: str,
        trace_headers: Mapping[str, str],
    ) -> AsyncIterator[tuple[Call, Piece]]:
        """Answer as bare pieces, each with the call, whose counts are final after the last piece."""
        target = await self._admit(body)
        async with self._hold(target) as adapter:
            call = self._call(endpoint, body, target, adapter, protocol, request_id, trace_headers)
            with self._measure(call, target, protocol):
                async with contextlib.aclosing(self.engine.pieces(call)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        yield call, piece

    async def _admit(self, body: Mapping[str, Any]) -> Target:
        if (reason := self.not_ready_reason()) is not None:
            raise errors.UnavailableError(_NOT_READY[reason], code=reason, retry_after_seconds=5)
        self.supervisor.quarantine.check(body)
        return await self.catalog.resolve(body["model"])

    @contextlib.asynccontextmanager
    async def _hold(self, target: Target) -> AsyncIterator[EngineAdapter | None]:
        """Count the request, and keep its adapter in the engine until it ends."""
        in_flight = self.metrics.in_flight.labels(self._label(target))
        in_flight.inc()
        self._in_flight += 1
        self._idle.clear()
        try:
            if target.artifact is None:
                yield None
            else:
                async with self.pool.use(target.artifact) as adapter:
                    yield adapter
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
            in_flight.dec()

    def _call(
        self, endpoint: Endpoint, body: Mapping[str, Any], target: Target, adapter: EngineAdapter | None,
        protocol: str, request_id: str, trace_headers: Mapping[str, str],
    ) -> Call:  # fmt: skip
        observe = self.metrics.inter_token_latency.labels(self._label(target), protocol).observe

        def on_tokens(call: Call, new_tokens: int) -> None:
            if call.last_token_at is not None:
                observe((time.monotonic() - call.last_token_at) / new_tokens)

        return Call(
            endpoint=endpoint,
            body=body,
            adapter=adapter,
            answer_model=target.answer_model,
            request_id=request_id,
            trace_headers=trace_headers,
            on_tokens=on_tokens if body.get("stream") else None,
        )

    @contextlib.contextmanager
    def _measure(self, call: Call, target: Target, protocol: str) -> Any:
        label = self._label(target)
        outcome = "cancelled"  # also for GeneratorExit: the client left
        self._calls[id(call)] = call
        try:
            yield
            outcome = "ok"
        except errors.CapoError as error:
            if isinstance(error, errors.EngineDeadError):
                self.supervisor.died_under(call)
            outcome = "client_error" if errors.wire_kind(error).http_status < 500 else "server_error"
            raise
        finally:
            del self._calls[id(call)]
            metrics = self.metrics
            metrics.e2e_latency.labels(label, protocol, outcome).observe(time.monotonic() - call.created_at)
            if call.first_token_at is not None:
                metrics.time_to_first_token.labels(label, protocol).observe(call.first_token_at - call.created_at)
            if call.queued_seconds is not None:
                metrics.queue_wait.labels(label, protocol).observe(call.queued_seconds)
            metrics.prompt_tokens.labels(label).inc(call.prompt_tokens)
            metrics.completion_tokens.labels(label).inc(call.completion_tokens)

    def _label(self, target: Target) -> str:
        return self.metrics.adapter_label(target.artifact.name if target.artifact is not None else None)

    # -- adapters and aliases ----------------------------------------------------------------------------------

    def adapters(self) -> list[AdapterView]:
        """Every adapter of the registry with its state here, by revision."""
        snapshot = self.catalog.snapshot
        aliases_of: dict[str, list[str]] = {}
        for name in sorted(snapshot.aliases):
            aliases_of.setdefault(snapshot.aliases[name].revision, []).append(name)
        return [
            AdapterView(artifact, self.pool.status(revision), aliases_of.get(revision, []))
            for revision, artifact in sorted(snapshot.artifacts.items())
            if artifact.manifest.kind == "lora"
        ]

    async def set_alias(self, alias: str, revision: str) -> Alias:
        """Point ``alias`` to ``revision``; requests that come after the return see it."""
        record = await asyncio.to_thread(self.catalog.registry.set_alias, alias, revision)
        await self.catalog.refresh()
        return record

    # -- following the registry --------------------------------------------------------------------------------

    def _follow_registry(self, old: Snapshot, new: Snapshot) -> None:
        for alias, record in new.aliases.items():
            before = old.aliases.get(alias)
            if before is not None and before.revision != record.revision:
                self.metrics.alias_flipped()
        for revision in old.artifacts.keys() - new.artifacts.keys():
            self.pool.withdraw(revision)
        for name in {a.name for a in old.artifacts.values()} - {a.name for a in new.artifacts.values()}:
            self.metrics.forget_adapter(name)
        # What was published while we run is likely to be asked for next; what was there at start loads on first use.
        if self._is_started:
            for revision in new.artifacts.keys() - old.artifacts.keys():
                artifact = new.artifacts[revision]
                if artifact.manifest.kind == "lora":
                    task = asyncio.create_task(self.pool.preload(artifact), name=f"preload {revision}")
                    self._preloads.add(task)
                    task.add_done_callback(self._preloads.discard)
