"""Which adapters are in the engine, and who uses them.

The pool keeps at most as many adapters resident as the engine has slots, so that vLLM never evicts, reloads from disk
or shares a slot on its own (a reload inside its step kills the engine when the file is gone; vLLM 0.32). Loads happen
on first use or ahead of it, out of band; unloading waits for the last user. When all slots are taken, the least
recently used idle adapter goes; when none is idle, requests wait in order of arrival, and adapters that have had their
turn are drained for those in line, so that a hot adapter cannot starve a cold one (:mod:`serve.turns`). One that still
drains is taken back when nobody waits any more, or when the next in line waits for that very adapter. Pinned adapters
never go for others; at least one slot is left to those.

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
from serve.gate import Gate, deleted
from serve.limits import ADAPTER_WAIT_SECONDS
from serve.metrics import Metrics
from serve.refusals import Refusals
from serve.resident import AdapterState, AdapterStatus, Resident, Vetting
from serve.turns import Turns

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
        self._turns = Turns(turn_seconds, max_wait_seconds)
        self._residents: dict[str, Resident] = {}
        self._leaving: list[Resident] = []
        self._refusals = Refusals(metrics)
        self._vettings: set[Vetting] = set()
        self._pinned: frozenset[str] = frozenset()
        self._line: deque[Resident] = deque()
        self._slots_in_use = 0
        self._engine_epoch = 0
        self._is_closed = False
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
            ModelNotFoundError: it was deleted while it was being loaded.
            UnavailableError: no slot became free in time, or the load took too long.
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
            yield resident.serving.adapter
        finally:
            self._let_go(resident.serving)

    def _let_go(self, resident: Resident) -> None:
        resident.users -= 1
        resident.last_used_at = time.monotonic()
        if resident.users == 0:
            if resident.ticket is not None and not resident.ticket.done():
                self._leave_line(resident)
            elif self._line or self._leaving:
                self._wake.set()

    async def preload(self, artifact: Artifact) -> bool:
        """Load ``artifact`` if a slot is free; never at the cost of another adapter. False: none was, or none any more
        once the gate had looked, and nothing was loaded. Refusals are kept, not raised."""
        if artifact.revision in self._residents:
            return True
        if self.num_free_slots <= 0:
            return False
        try:
            resident = self._begin_load(artifact)
        except errors.CapoError:
            return True
        resident.is_ahead = True
        resident.last_used_at = time.monotonic()
        await asyncio.wait((resident.ready,), timeout=self._max_wait_seconds)
        return not resident.ready.cancelled()

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
            ModelNotFoundError: it was deleted meanwhile.
        """
        self._refusals.check(artifact.revision)
        vetting = Vetting(artifact.revision)
        self._vettings.add(vetting)
        try:
            await self._gate.check(artifact, self._engine.limits)
            self._refusals.forget_damage(artifact.revision)
        except errors.InvalidArtifactError as error:
            if vetting.is_withdrawn:
                raise deleted(artifact) from error
            self._refusals.add(artifact.revision, error)
            raise
        finally:
            self._vettings.remove(vetting)
            if vetting.is_withdrawn:
                self._forget(artifact.revision)  # once more: it was judged anew meanwhile

    async def _wait_ready(self, resident: Resident) -> None:
        try:
            async with asyncio.timeout(self._max_wait_seconds):
                await asyncio.shield(resident.ready)
        except TimeoutError:
            raise resident.not_ready_in(self._max_wait_seconds, max_loras=self._engine.limits.max_loras) from None

    # -- loading ---------------------------------------------------------------------------------------------

    def _begin_load(self, artifact: Artifact) -> Resident:
        if self._is_closed:
            raise errors.EngineDeadError("The service has shut down. Ask another replica.", retry_after_seconds=1)
        self._refusals.check(artifact.revision)
        adapter = EngineAdapter(artifact.revision, next(self._engine_ids), artifact.path)
        resident = Resident(artifact, adapter)
        self._residents[artifact.revision] = resident
        # The epoch of now, not of the task's first step: the engine may be gone by then.
        self._spawn(self._load(resident, self._engine_epoch))
        return resident

    async def _load(self, resident: Resident, epoch: int) -> None:
        try:
            await self._load_in_turn(resident, epoch)
        finally:
            if resident.is_withdrawn:
                self._forget(resident.artifact.revision)  # once more: it was judged anew meanwhile

    async def _load_in_turn(self, resident: Resident, epoch: int) -> None:
        artifact = resident.artifact
        started_at = time.monotonic()
        has_slot = False
        try:
            await self._gate.check(artifact, self._engine.limits)
            self._refusals.forget_damage(artifact.revision)
            if epoch != self._engine_epoch:
                return  # its users have been told; a new residency begins with their next request
            if resident.users == 0 and not (resident.is_ahead and self.num_free_slots >= 0):
                self._drop(resident)
                return
            await self._take_slot(resident)
            if epoch != self._engine_epoch:
                return  # the slot was one of the engine before
            has_slot = True
            slot_at = time.monotonic()
            try:
                await self._engine.load_adapter(resident.adapter)
            except errors.InvalidArtifactError:
                await self._gate.require_there(artifact)
                raise
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
        resident.turn_began_at = time.monotonic()
        resident.state = AdapterState.LOADED
        resident.ready.set_result(None)
        self._metrics.adapter_loaded(resident.load_seconds)
        logger.info(
            "loaded %s in %.3f s (waited %.3f s)",
            artifact.revision,
            resident.load_seconds,
            slot_at - started_at,
        )
        if resident.is_released:
            self._retire(resident)
        self._wake.set()

    def _load_failed(self, resident: Resident, error: Exception, has_slot: bool) -> None:
        revision = resident.artifact.revision
        if self._residents.get(revision) is resident:
            del self._residents[revision]
        if has_slot:
            self._slots_in_use -= 1
        if resident.is_withdrawn and not isinstance(error, errors.EngineDeadError):
            error = deleted(resident.artifact)  # whatever became of it without its files is no verdict on it
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
        resident.waiting_since = time.monotonic()
        self._line.append(resident)
        self._wake.set()
        await resident.ticket

    def _leave_line(self, resident: Resident) -> None:
        """Everybody who waited for it has left before it got a slot: nobody is served by loading it."""
        assert resident.ticket is not None, resident
        self._line.remove(resident)
        resident.ticket.cancel()  # ends the task that loads it
        self._drop(resident)

    def _drop(self, resident: Resident) -> None:
        if self._residents.get(resident.artifact.revision) is resident:
            del self._residents[resident.artifact.revision]
        resident.ready.cancel()
        self._wake.set()

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
        while True:
            while (returning := next(filter(self._drains_for_nobody, self._leaving), None)) is not None:
                self._take_back(returning)
            if self._line and self._slots_in_use < self._engine.limits.max_loras:
                ticket = self._line.popleft().ticket
                if ticket is not None and not ticket.done():
                    self._slots_in_use += 1
                    ticket.set_result(None)
            elif (left := next((r for r in self._leaving if r.is_idle), None)) is not None:
                self._leaving.remove(left)
                await self._unload(left)
            elif not self._line:
                return None
            elif (victim := min(self._unpinned(idle=True), key=lambda r: r.last_used_at, default=None)) is not None:
                del self._residents[victim.artifact.revision]
                self._metrics.adapter_evicted()
                await self._unload(victim)
            else:
                over, seconds = self._turns.over(
                    self._unpinned(idle=False), leaving=self._leaving, line=self._line, now=time.monotonic()
                )
                for resident in over:
                    self._retire(resident)
                return seconds

    def _unpinned(self, *, idle: bool) -> list[Resident]:
        """What is loaded and may go for others."""
        loaded = (r for r in self._residents.values() if r.state is AdapterState.LOADED)
        return [r for r in loaded if r.is_idle is idle and r.artifact.revision not in self._pinned]

    def _drains_for_nobody(self, resident: Resident) -> bool:
        """Nobody waits any more, or the first in line waits for this very adapter."""
        later = self._residents.get(resident.artifact.revision)
        return not resident.is_released and later is (self._line[0] if self._line else None)

    def _take_back(self, resident: Resident) -> None:
        """Let one that drains begin another turn, with the users of a later stay that has no slot yet."""
        self._leaving.remove(resident)
        resident.state = AdapterState.LOADED
        resident.turn_began_at = time.monotonic()
        later = self._residents.get(resident.artifact.revision)
        self._residents[resident.artifact.revision] = resident
        if later is not None:
            assert later.ticket is not None, later
            self._line.remove(later)
            later.ticket.cancel()  # ends the task that would load it
            later.earlier_stay = resident
            resident.users += later.users
            resident.last_used_at = max(resident.last_used_at, later.last_used_at)
            later.ready.set_result(None)

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
        for resident in self.residents():
            if resident.artifact.revision == revision:
                resident.is_withdrawn = True
        for vetting in self._vettings:
            vetting.is_withdrawn |= vetting.revision == revision
        self._forget(revision)
        self.release(revision)

    def release(self, revision: str) -> None:
        """Let the present users of ``revision`` finish, then unload it; later ones load it again."""
        for resident in list(self.residents()):
            if resident.artifact.revision == revision:
                resident.is_released = True
                if resident.state is AdapterState.LOADED:
                    self._retire(resident)
        self._wake.set()

    def _forget(self, revision: str) -> None:
        self._refusals.forget(revision)
        self._gate.forget(revision)

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
        for resident in self._line:
            assert resident.ticket is not None, resident
            resident.ticket.cancel()
        self._line.clear()
        self._slots_in_use = 0
        return [resident.artifact for resident in loaded]

    def close(self) -> None:
        """The engine is gone for good. Whoever comes now is told so at once: nobody hands out slots any more."""
        self._is_closed = True
        self.forget_all()

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
