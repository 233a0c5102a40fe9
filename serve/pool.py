"""Which adapters are in the engine, and who uses them.

The pool keeps at most as many adapters resident as the engine has slots, so that vLLM never evicts, reloads from disk
or shares a slot on its own (a reload inside its step kills the engine when the file is gone; vLLM 0.32). Loads happen
on first use or ahead of it, out of band; unloading waits for the last user. When all slots are taken, the least
recently used idle adapter goes; when none is idle, requests wait in order of arrival, and an adapter that has had its
turn is drained for the next in line, so that a hot adapter cannot starve a cold one. Pinned adapters never go for
others; at least one slot is left to those.

Everything here runs on one event loop; there are no locks because no state changes across an ``await`` unguarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Iterator
from typing import Any

from registry import Artifact, errors
from serve.engine_api import Engine, EngineAdapter
from serve.gate import Gate
from serve.limits import ADAPTER_WAIT_SECONDS
from serve.metrics import Metrics
from serve.refusals import Refusals
from serve.resident import AdapterState, AdapterStatus, Resident

logger = logging.getLogger(__name__)

_PAUSE_AFTER_BUG_SECONDS = 1.0


class AdapterPool:
    """Owner of every adapter in the engine.

    ``max_wait_seconds`` bounds how long a request waits for a slot; ``turn_seconds`` is how long a busy adapter keeps
    its slot while others wait.
    """

    def __init__(
        self,
        engine: Engine,
        gate: Gate,
        metrics: Metrics,
        *,
        max_wait_seconds: float = ADAPTER_WAIT_SECONDS,
        turn_seconds: float = 1.0,
    ) -> None:
        self._engine = engine
        self._gate = gate
        self._metrics = metrics
        self._max_wait_seconds = max_wait_seconds
        self._turn_seconds = turn_seconds
        self._residents: dict[str, Resident] = {}
        self._leaving: list[Resident] = []
        self._refusals = Refusals(metrics)
        self._pinned: frozenset[str] = frozenset()
        self._tickets: deque[asyncio.Future[None]] = deque()
        self._slots_in_use = 0
        self._engine_epoch = 0
        self._engine_ids = itertools.count(1)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.watch_pool(lambda: len(self._residents) + len(self._leaving), lambda: len(self._pinned))

    # -- using -----------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def use(self, artifact: Artifact) -> AsyncIterator[EngineAdapter]:
        """Hold ``artifact`` in the engine for the length of the block, loading it first where needed.

        Raises:
            InvalidArtifactError: the adapter was refused; the reason is its message and code.
            UnavailableError: no slot became free in time.
        """
        resident = self._residents.get(artifact.revision)
        if resident is None:
            resident = self._begin_load(artifact)
        resident.users += 1
        resident.last_used_at = time.monotonic()
        try:
            if not resident.ready.done():
                await self._wait_ready(resident)
            resident.ready.result()
            yield resident.adapter
        finally:
            resident.users -= 1
            resident.last_used_at = time.monotonic()
            if resident.users == 0:
                if resident.ticket is not None and not resident.ticket.done():
                    self._leave_line(resident)
                elif self._tickets or self._leaving:
                    self._wake.set()

    async def preload(self, artifact: Artifact) -> bool:
        """Load ``artifact`` if a slot is free; never at the cost of another adapter. False: none was, and nothing was
        done. Refusals are kept, not raised."""
        if artifact.revision in self._residents:
            return True
        if self.num_free_slots <= 0:
            return False
        with contextlib.suppress(errors.CapoError):
            async with self.use(artifact):
                pass
        return True

    @property
    def num_free_slots(self) -> int:
        """Slots that hold no adapter, and that none is on its way to."""
        return self._engine.limits.max_loras - len(self._residents) - len(self._leaving)

    async def warm(self, artifacts: Iterable[Artifact], seconds: float) -> bool:
        """Load ``artifacts``, by turn where all slots are busy; false when slots or time ran out before all were in.

        Raises:
            InvalidArtifactError: one was refused.
            EngineDeadError: the engine died meanwhile, perhaps of this.
        """
        try:
            async with asyncio.timeout(seconds):
                for artifact in artifacts:
                    async with self.use(artifact):
                        pass
        except errors.EngineDeadError:
            raise
        except (TimeoutError, errors.UnavailableError):
            return False
        return True

    async def vet(self, artifact: Artifact) -> None:
        """The gate's checks that need no engine; a refusal is remembered.

        Raises:
            InvalidArtifactError: the adapter is refused.
        """
        self._refusals.check(artifact.revision)
        try:
            await self._gate.check(artifact, self._engine.limits)
        except errors.InvalidArtifactError as error:
            self._refusals.add(artifact.revision, error)
            raise

    async def _wait_ready(self, resident: Resident) -> None:
        try:
            async with asyncio.timeout(self._max_wait_seconds):
                await asyncio.shield(resident.ready)
        except TimeoutError:
            raise errors.UnavailableError(
                f"No adapter slot became free for {resident.artifact.revision} in {self._max_wait_seconds:g} s: all "
                f"{self._engine.limits.max_loras} are in use. Try again, or start the service with more (--max-loras).",
                code="adapter_slots_busy",
                retry_after_seconds=self._turn_seconds,
            ) from None

    # -- loading ---------------------------------------------------------------------------------------------

    def _begin_load(self, artifact: Artifact) -> Resident:
        self._refusals.check(artifact.revision)
        adapter = EngineAdapter(artifact.revision, next(self._engine_ids), artifact.path)
        resident = Resident(artifact, adapter)
        self._residents[artifact.revision] = resident
        # The epoch of now, not of the task's first step: the engine may be gone by then.
        self._spawn(self._load(resident, self._engine_epoch))
        return resident

    async def _load(self, resident: Resident, epoch: int) -> None:
        artifact = resident.artifact
        started_at = time.monotonic()
        has_slot = False
        try:
            await self._gate.check(artifact, self._engine.limits)
            if epoch != self._engine_epoch:
                return  # its users have been told; a new residency begins with their next request
            if resident.users == 0:
                self._drop(resident)
                return
            await self._take_slot(resident)
            if epoch != self._engine_epoch:
                return  # the slot was one of the engine before
            has_slot = True
            slot_at = time.monotonic()
            await self._engine.load_adapter(resident.adapter)
            try:
                resident.probe_agreement = await self._gate.probe(artifact, self._engine, resident.adapter)
            except errors.CapoError:
                with contextlib.suppress(errors.CapoError):
                    await self._engine.unload_adapter(resident.adapter)
                raise
        except Exception as error:
            if epoch == self._engine_epoch:
                self._load_failed(resident, error, has_slot)
            return
        if epoch != self._engine_epoch:
            return  # the engine that it was loaded into is gone
        resident.load_seconds = time.monotonic() - slot_at
        resident.loaded_at = time.monotonic()
        resident.state = AdapterState.LOADED
        resident.ready.set_result(None)
        self._metrics.adapter_loaded(resident.load_seconds)
        logger.info(
            "loaded %s in %.3f s (waited %.3f s)",
            artifact.revision,
            resident.load_seconds,
            slot_at - started_at,
        )
        self._wake.set()

    def _load_failed(self, resident: Resident, error: Exception, has_slot: bool) -> None:
        revision = resident.artifact.revision
        if self._residents.get(revision) is resident:
            del self._residents[revision]
        if has_slot:
            self._slots_in_use -= 1
        if not isinstance(error, errors.CapoError):
            logger.error("loading %s failed", revision, exc_info=error)
            error = errors.InternalError(f"loading {revision} failed: {type(error).__name__}")
        if isinstance(error, errors.InvalidArtifactError):
            self._refusals.add(revision, error)
        resident.ready.set_exception(error)
        resident.ready.exception()  # mark as seen: a preload has no waiter
        self._wake.set()

    async def _take_slot(self, resident: Resident) -> None:
        resident.ticket = asyncio.get_running_loop().create_future()
        self._tickets.append(resident.ticket)
        self._wake.set()
        await resident.ticket

    def _leave_line(self, resident: Resident) -> None:
        """Everybody who waited for it has left before it got a slot: nobody is served by loading it."""
        assert resident.ticket is not None, resident
        self._tickets.remove(resident.ticket)
        resident.ticket.cancel()  # ends the task that loads it
        self._drop(resident)

    def _drop(self, resident: Resident) -> None:
        if self._residents.get(resident.artifact.revision) is resident:
            del self._residents[resident.artifact.revision]
        resident.ready.cancel()

    # -- making room -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Hand out slots in order of arrival, for ever; run as a task."""
        while True:
            self._wake.clear()
            try:
                wait_seconds = await self._make_progress()
            except Exception:
                # Our bug; but without this task no adapter would ever be loaded again.
                logger.exception("handing out adapter slots failed; going on")
                wait_seconds = _PAUSE_AFTER_BUG_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_seconds):
                    await self._wake.wait()

    async def _make_progress(self) -> float | None:
        """Do all that can be done now; returns the seconds after which more may be possible, ``None`` for never."""
        while (resident := next((r for r in self._leaving if r.is_idle), None)) is not None:
            self._leaving.remove(resident)
            await self._unload(resident)
        while self._tickets:
            if self._slots_in_use < self._engine.limits.max_loras:
                ticket = self._tickets.popleft()
                if not ticket.done():
                    self._slots_in_use += 1
                    ticket.set_result(None)
                continue
            idle = (r for r in self._residents.values() if r.is_idle and r.artifact.revision not in self._pinned)
            victim = min(idle, key=lambda r: r.last_used_at, default=None)
            if victim is None:
                return self._drain_next()
            del self._residents[victim.artifact.revision]
            self._metrics.adapter_evicted()
            await self._unload(victim)
        return None

    def _drain_next(self) -> float | None:
        """All slots are busy and somebody waits: let the adapter with the longest turn finish and leave.

        Its next requests start a new residency at the end of the line. One at a time: the line moves with each.
        """
        if self._leaving:
            return None
        loaded = [
            r
            for r in self._residents.values()
            if r.state is AdapterState.LOADED and r.artifact.revision not in self._pinned
        ]
        if not loaded:
            return None
        longest = min(loaded, key=lambda r: r.loaded_at or 0.0)
        remaining = (longest.loaded_at or 0.0) + self._turn_seconds - time.monotonic()
        if remaining > 0:
            return remaining
        self._retire(longest)
        return None

    def _retire(self, resident: Resident) -> None:
        del self._residents[resident.artifact.revision]
        resident.state = AdapterState.DRAINING
        self._leaving.append(resident)

    async def _unload(self, resident: Resident) -> None:
        epoch = self._engine_epoch
        try:
            await self._engine.unload_adapter(resident.adapter)
        except errors.CapoError as error:
            # A dead engine holds nothing; the slot counts as free either way.
            logger.warning("unloading %s: %s", resident.artifact.revision, error)
        if epoch == self._engine_epoch:
            self._slots_in_use -= 1

    # -- pinning -----------------------------------------------------------------------------------------------

    @property
    def max_pins(self) -> int:
        """One less than there are slots: the last one is what everybody else takes turns in."""
        return self._engine.limits.max_loras - 1

    def pin(self, revisions: Collection[str]) -> None:
        """From now on exactly these are never evicted or drained for others. Whoever pins them loads them."""
        assert len(revisions) <= self.max_pins, (revisions, self.max_pins)
        self._pinned = frozenset(revisions)
        self._wake.set()

    # -- following the registry --------------------------------------------------------------------------------

    def withdraw(self, revision: str) -> None:
        """The registry no longer has ``revision``: let its users finish, then unload it."""
        self._refusals.forget(revision)
        self._gate.forget(revision)
        self.release(revision)

    def release(self, revision: str) -> None:
        """Let the present users of ``revision`` finish, then unload it; later ones load it again."""
        resident = self._residents.get(revision)
        if resident is not None and resident.state is AdapterState.LOADED:
            self._retire(resident)
            self._wake.set()

    def forget_all(self) -> list[Artifact]:
        """The engine is gone and holds nothing. Ids go on counting; users of the old one get errors.

        Returns what was loaded, the pinned ones first, then the most recently used, for whoever wants it back.
        """
        loaded = [r for r in self._residents.values() if r.state is AdapterState.LOADED]
        loaded.sort(key=lambda r: (r.artifact.revision not in self._pinned, -r.last_used_at))
        self._engine_epoch += 1
        for resident in [*self._residents.values(), *self._leaving]:
            if not resident.ready.done():
                resident.ready.set_exception(
                    errors.EngineDeadError("The engine was restarted. Try again.", retry_after_seconds=1)
                )
                resident.ready.exception()
        self._residents.clear()
        self._leaving.clear()
        for ticket in self._tickets:
            ticket.cancel()
        self._tickets.clear()
        self._slots_in_use = 0
        return [resident.artifact for resident in loaded]

    # -- looking ---------------------------------------------------------------------------------------------

    def status(self, revision: str) -> AdapterStatus:
        is_pinned, notes = revision in self._pinned, self._gate.notes(revision)
        if (refusal := self._refusals.get(revision)) is not None:
            return AdapterStatus(AdapterState.REFUSED, refusal, is_pinned=is_pinned)
        if (resident := self._residents.get(revision)) is not None:
            return AdapterStatus(resident.state, resident=resident, is_pinned=is_pinned, notes=notes)
        for resident in self._leaving:
            if resident.artifact.revision == revision:
                return AdapterStatus(AdapterState.DRAINING, resident=resident, is_pinned=is_pinned, notes=notes)
        return AdapterStatus(AdapterState.AVAILABLE, is_pinned=is_pinned, notes=notes)

    def residents(self) -> Iterator[Resident]:
        yield from self._residents.values()
        yield from self._leaving

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
