"""Inference from a model name to an answer: resolve, hold the adapter, call the engine, measure.

Both faces, HTTP and gRPC, call this and nothing deeper; neither wire format is known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from registry import Artifact, DamagedArtifact, errors
from registry.principal import count_tokens, current_principal, note_change
from serve import readiness
from serve.alias_control import AliasControl
from serve.cache_salts import CacheSalts
from serve.catalog import Catalog, Target
from serve.engine_api import Call, Endpoint, Engine, Piece
from serve.limits import Limits
from serve.metrics import Metrics
from serve.model_list import who_may_call
from serve.pins import Pin, Pins
from serve.pool import AdapterPool
from serve.registry_follower import RegistryFollower
from serve.request_trace import RequestTrace, traced
from serve.resident import AdapterStatus
from serve.supervisor import Supervisor

logger = logging.getLogger(__name__)

_LAG_SAMPLE_SECONDS = 0.1


def _cut_off() -> errors.UnavailableError:
    """For who was still being answered at the drain's deadline: nobody restarts the engine of a service that ends."""
    return errors.UnavailableError(
        "The service shut down before the answer was whole. Ask another replica.",
        code="shut_down",
        retry_after_seconds=1,
    )


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request came from."""

    protocol: str
    """``http`` or ``grpc``; a metric label."""
    request_id: str
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    """W3C trace context, as far as the client sent it."""


@dataclass(frozen=True, slots=True)
class AdapterView:
    """One adapter as the admin API shows it."""

    artifact: Artifact
    status: AdapterStatus
    aliases: list[str]
    """Those whose main revision it is."""
    canary_of: list[str]
    """Those whose canary it is."""


class ServingService:
    """The parts of a serving process, composed; owns their background tasks between start and stop."""

    def __init__(
        self,
        *,
        engine: Engine,
        catalog: Catalog,
        pool: AdapterPool,
        metrics: Metrics,
        limits: Limits | None = None,
        pins: Sequence[str] = (),
    ) -> None:
        self.engine = engine
        self.catalog = catalog
        self.pool = pool
        self.metrics = metrics
        self._cache_salts = CacheSalts()
        self._tasks: list[asyncio.Task[None]] = []
        self._limits = limits or Limits()
        self.supervisor = Supervisor(engine, pool, metrics, stall_seconds=self._limits.engine_stall_seconds)
        self._in_flight = 0
        self._in_flight_of: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_started = False
        self._is_draining = False
        self.aliases = AliasControl(
            catalog, pool, require_ready=self.require_ready, warm_seconds=self._limits.alias_warm_seconds
        )
        self.pins = Pins(catalog, pool, pins, may_load=lambda: self.not_ready_reason() is None)
        self._follower = RegistryFollower(catalog, pool, self.pins, metrics)

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine, read the registry, and begin to follow it. Returns when requests can be answered."""
        await self.engine.start()
        self._tasks.append(asyncio.create_task(self.pool.run(), name="adapter-pool"))
        await self.catalog.refresh()
        await self.pins.load()
        self._tasks.append(asyncio.create_task(self.pins.run(), name="pins"))
        self._tasks.append(asyncio.create_task(self._follower.run(), name="load-ahead"))
        self._tasks.append(asyncio.create_task(self.catalog.watch(), name="registry-watch"))
        self._tasks.append(asyncio.create_task(self.supervisor.run(), name="engine-supervisor"))
        self._tasks.append(asyncio.create_task(self._watch_event_loop(), name="event-loop-lag"))
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

    def require_ready(self) -> None:
        """Raises:
        UnavailableError: requests should not come here now.
        """
        readiness.require(self.not_ready_reason())

    async def drain(self, deadline_seconds: float) -> int:
        """Refuse new requests and wait for those in flight; returns how many were still running at the deadline."""
        self._is_draining = True
        self.metrics.ready.set(0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_seconds):
                await self._idle.wait()
        return self._in_flight

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self.pool.close()  # who waits for a slot now, or comes later, would wait in vain
        await self.engine.stop(timeout_seconds=5)

    # -- inference -------------------------------------------------------------------------------------------

    async def complete(self, endpoint: Endpoint, body: Mapping[str, Any], origin: Origin) -> bytes:
        """Answer in one piece, as OpenAI's response object in JSON."""
        async with self._running(endpoint, body, origin) as call:
            return await self.engine.complete(call)

    async def stream(self, endpoint: Endpoint, body: Mapping[str, Any], origin: Origin) -> AsyncGenerator[str, None]:
        """Answer as server-sent events. Trouble is raised; only a whole answer ends with ``[DONE]``."""
        async with (
            self._running(endpoint, body, origin) as call,
            contextlib.aclosing(self.engine.stream(call)) as chunks,
        ):
            async for chunk in chunks:
                yield chunk

    async def pieces(
        self, endpoint: Endpoint, body: Mapping[str, Any], origin: Origin
    ) -> AsyncGenerator[tuple[Call, Piece], None]:
        """Answer as bare pieces, each with the call, whose counts are final after the last piece."""
        async with (
            self._running(endpoint, body, origin) as call,
            contextlib.aclosing(self.engine.pieces(call)) as pieces,
        ):
            async for piece in pieces:
                yield call, piece

    async def convert_tokens(self, endpoint: Endpoint, body: Mapping[str, Any]) -> bytes:
        """Answer a request to tokenize or detokenize. Any model name will do: adapters share the base's tokenizer."""
        with self._inside():
            self._limits.check(body)
            principal = who_may_call(body["model"])
            await self.catalog.resolve(body["model"], principal=principal)
            return await self.engine.convert_tokens(endpoint, body)

    @contextlib.asynccontextmanager
    async def _running(self, endpoint: Endpoint, body: Mapping[str, Any], origin: Origin) -> AsyncIterator[Call]:
        """One request from its admission to its end: resolved, measured, its adapter held in the engine."""
        trace = traced(
            endpoint,
            body["model"],
            protocol=origin.protocol,
            request_id=origin.request_id,
            headers=origin.trace_headers,
        )
        with trace as request_trace, self._inside():
            async with self._admitted(endpoint, body, origin, request_trace) as call:
                yield call

    @contextlib.asynccontextmanager
    async def _admitted(
        self, endpoint: Endpoint, body: Mapping[str, Any], origin: Origin, request_trace: RequestTrace
    ) -> AsyncIterator[Call]:
        self._limits.check(body)
        self.supervisor.quarantine.check(body)
        principal = who_may_call(body["model"])
        target = await self.catalog.resolve(body["model"], user=_end_user(body), principal=principal)
        if principal.key_id is not None:
            # Else the time to a first token would tell one tenant which prompts another one sent.
            body = {**body, "cache_salt": self._cache_salts.of(principal.tenant)}
        model = target.artifact.revision if target.artifact is not None else self.catalog.base_model
        self._refuse_excess(model)
        label = self.metrics.adapter_label(target.artifact.name if target.artifact is not None else None)
        call = Call(
            endpoint=endpoint,
            body=body,
            adapter=None,
            answer_model=target.answer_model,
            request_id=origin.request_id,
            trace_headers=request_trace.headers,
            tenant=principal.tenant,
            on_tokens=self._inter_token_observer(label, origin.protocol) if body.get("stream") else None,
        )
        request_trace.follow(call, target.artifact)
        with self._measure(call, target, model, label, origin.protocol):
            # First, for who waits for a verdict on a schema must hold no adapter that others want to go.
            await self.engine.check(call)
            call.checked_at = time.monotonic()
            if target.artifact is None:
                yield call
            else:
                async with self.pool.use(target.artifact) as adapter:
                    call.adapter, call.adapter_at = adapter, time.monotonic()
                    yield call

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """From the first look at a request to its end, whatever it waits for: what a drain waits for.

        Raises:
            UnavailableError: requests should not come now, or too many are here.
        """
        self.require_ready()
        if self._in_flight >= self._limits.max_in_flight:
            raise errors.UnavailableError(
                f"{self._in_flight} requests are in flight, which is the limit. Try again shortly.",
                code="overloaded",
                retry_after_seconds=1,
            )
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        except errors.EngineDeadError as error:
            if self._is_draining:
                raise _cut_off() from error
            raise
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    def _refuse_excess(self, model: str) -> None:
        """Requests beyond what can be answered in reasonable time are better refused than queued for ever."""
        if self._in_flight_of[model] >= self._limits.max_in_flight_per_model:
            raise errors.RateLimitedError(
                f"{self._in_flight_of[model]} requests to {model} are in flight, the limit for one model. Send fewer "
                "at a time, or try again shortly.",
                code="model_overloaded",
                param="model",
                retry_after_seconds=1,
            )

    def _inter_token_observer(self, label: str, protocol: str) -> Callable[[float | None, int], None]:
        observe = self.metrics.inter_token_latency.labels(label, protocol).observe

        def on_tokens(seconds: float | None, new_tokens: int) -> None:
            if seconds is not None:
                observe(seconds / new_tokens)

        return on_tokens

    @contextlib.contextmanager
    def _measure(self, call: Call, target: Target, model: str, label: str, protocol: str) -> Iterator[None]:
        metrics = self.metrics
        self._in_flight_of[model] += 1
        in_flight = metrics.in_flight.labels(label)
        in_flight.inc()
        outcome = "cancelled"  # also for GeneratorExit: the client left
        try:
            yield
            outcome = "ok"
        except Exception as error:
            if isinstance(error, errors.EngineDeadError) and call.was_in_engine and not self._is_draining:
                self.supervisor.died_under(call)
            outcome = "client_error" if errors.wire_kind(error).http_status < 500 else "server_error"
            raise
        finally:
            self._in_flight_of[model] -= 1
            if not self._in_flight_of[model]:
                del self._in_flight_of[model]
            in_flight.dec()
            if target.arm is not None and self._runs_canary(target.requested):
                metrics.alias_request(target.requested, target.arm, outcome)
            label = metrics.settled_label(label)
            metrics.outcomes.labels(label, outcome).inc()
            if outcome == "ok":
                metrics.e2e_latency.labels(label, protocol).observe(time.monotonic() - call.created_at)
            if call.first_token_at is not None:
                metrics.time_to_first_token.labels(label, protocol).observe(call.first_token_at - call.created_at)
            if target.artifact is not None and call.checked_at is not None:
                # Also of those who gave up: theirs are the longest waits.
                metrics.adapter_wait.labels(label).observe((call.adapter_at or time.monotonic()) - call.checked_at)
            if call.queued_seconds is not None:
                metrics.queue_wait.labels(label).observe(call.queued_seconds)
            metrics.prompt_tokens.labels(label).inc(call.prompt_tokens)
            metrics.completion_tokens.labels(label).inc(call.completion_tokens)
            count_tokens(call.prompt_tokens + call.completion_tokens)

    async def _watch_event_loop(self) -> None:
        observe = self.metrics.event_loop_lag.observe
        while True:
            asked_at = time.monotonic()
            await asyncio.sleep(_LAG_SAMPLE_SECONDS)
            observe(max(0.0, time.monotonic() - asked_at - _LAG_SAMPLE_SECONDS))

    # -- adapters and aliases ----------------------------------------------------------------------------------

    def adapters(self) -> list[AdapterView]:
        """Every adapter of the registry that whoever asks sees, with its state here, by revision."""
        snapshot, principal = self.catalog.snapshot, current_principal()
        aliases_of: dict[str, list[str]] = {}
        canary_of: dict[str, list[str]] = {}
        for alias in snapshot.aliases_of(principal):
            aliases_of.setdefault(alias.revision, []).append(alias.alias)
            if alias.canary is not None:
                canary_of.setdefault(alias.canary.revision, []).append(alias.alias)
        return [
            AdapterView(artifact, self.pool.status(r), aliases_of.get(r, []), canary_of.get(r, []))
            for r, artifact in sorted(snapshot.artifacts.items())
            if artifact.manifest.kind == "lora" and principal.sees(artifact.manifest.tenant)
        ]

    def damaged_adapters(self) -> list[DamagedArtifact]:
        """Directories of the registry that should be artifacts and are not, by revision. Nothing says whose they are,
        so only who may change what belongs to no tenant sees them."""
        damaged = self.catalog.snapshot.damaged
        return [damaged[revision] for revision in sorted(damaged)] if current_principal().owns_shared else []

    async def pin(self, reference: str) -> Pin:
        """Keep what ``reference`` means in the engine until :meth:`Pins.remove`; see :meth:`Pins.add`."""
        note_change(reference=reference)
        self.require_ready()
        return await self.pins.add(
            reference, load_seconds=self._limits.alias_warm_seconds, principal=current_principal()
        )

    def _runs_canary(self, alias: str) -> bool:
        record = self.catalog.snapshot.aliases.get(alias)
        return record is not None and record.canary is not None


def _end_user(body: Mapping[str, Any]) -> str | None:
    """OpenAI's ``user``: who is behind the request, as far as the client says."""
    user = body.get("user")
    return user if isinstance(user, str) and user else None
