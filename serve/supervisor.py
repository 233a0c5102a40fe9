"""Keeps the engine alive: notices death and standstill, starts it again in process, and keeps killers away.

An engine counts as standing still when it has had work for ``stall_seconds`` and finished nothing meanwhile, neither a
step nor the load of an adapter. A request body that was in the engine at two deaths is refused for a while, so that it
cannot kill a third time; one that only waited for its adapter was not in it. A body that only kept bad company is set
free again after that while.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from registry import Artifact, errors
from serve.engine_api import Call, Engine
from serve.metrics import Metrics
from serve.pool import AdapterPool

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_QUARANTINE_SECONDS = 600.0
_DEATHS_TO_QUARANTINE = 2
_MAX_SUSPECTS = 10_000


@dataclass(slots=True)
class _Suspect:
    deaths: set[int] = field(default_factory=set)
    """The numbers of those at which it was in the engine."""
    blamed_at: float = 0.0


class Quarantine:
    """Request bodies that were in the engine when it died, by fingerprint. Bounded in number and time."""

    def __init__(self, seconds: float = _QUARANTINE_SECONDS) -> None:
        self._seconds = seconds
        self._suspects: dict[str, _Suspect] = {}
        """Who was blamed last stands last."""

    def blame(self, call: Call, death: int) -> None:
        """``call`` was in the engine at its ``death``-th death."""
        self._acquit()
        fingerprint = _fingerprint(call.body)
        suspect = self._suspects.pop(fingerprint, None) or _Suspect()
        if len(self._suspects) < _MAX_SUSPECTS:
            suspect.deaths.add(death)
            suspect.blamed_at = time.monotonic()
            self._suspects[fingerprint] = suspect

    def check(self, body: Mapping[str, Any]) -> None:
        """Costs nothing while no engine has died lately.

        Raises:
            InvalidRequestError: the engine died twice while it worked on this very body.
        """
        self._acquit()
        if not self._suspects:
            return
        suspect = self._suspects.get(_fingerprint(body))
        if suspect is not None and (deaths := len(suspect.deaths)) >= _DEATHS_TO_QUARANTINE:
            raise errors.InvalidRequestError(
                f"The engine died {deaths} times while it worked on this request, so it is not tried again for "
                f"{self._seconds / 60:g} minutes. Change the request, or report it with its x-request-id.",
                code="quarantined",
            )

    def _acquit(self) -> None:
        """Let go whoever was blamed too long ago; else every body would be hashed for ever after one death."""
        is_kept_from = time.monotonic() - self._seconds
        while self._suspects and next(iter(self._suspects.values())).blamed_at < is_kept_from:
            del self._suspects[next(iter(self._suspects))]


class Supervisor:
    """Watches one engine; :meth:`run` is its task."""

    def __init__(
        self,
        engine: Engine,
        pool: AdapterPool,
        metrics: Metrics,
        *,
        stall_seconds: float,
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._metrics = metrics
        self._stall_seconds = stall_seconds
        self.quarantine = Quarantine()
        self.is_restarting = False
        self._deaths = 0
        self._work_since: float | None = None
        self._reload: asyncio.Task[None] | None = None

    def died_under(self, call: Call) -> None:
        """``call`` ended because the engine died; said by whoever made the call."""
        self.quarantine.blame(call, self._deaths)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self._look()
            except Exception:
                # Our bug; but without this task a dead engine would never be started again.
                logger.exception("looking after the engine failed; going on")

    async def _look(self) -> None:
        if self._engine.is_dead:
            logger.error("the engine died")
        elif self._stands_still():
            logger.error("the engine has finished nothing for %g s with work in it; ending it", self._stall_seconds)
            await self._engine.kill()
        else:
            return
        await self._restart()

    def _stands_still(self) -> bool:
        now = time.monotonic()
        if not self._engine.has_work:
            self._work_since = None
            return False
        if self._work_since is None:
            self._work_since = now
        return now - max(self._work_since, self._engine.last_progress_at) > self._stall_seconds

    async def _restart(self) -> None:
        """Start the engine again, with growing pauses for as long as that fails."""
        self.is_restarting = True
        self._metrics.ready.set(0)
        wanted = self._pool.forget_all()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            try:
                await self._engine.stop(timeout_seconds=1)
                self._pool.forget_all()  # what was begun while the last try was up
                await self._engine.start()
                break
            except Exception:
                logger.exception("the engine did not start; next try in %g s", pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        self._deaths += 1
        self._metrics.engine_restarts.inc()
        self.is_restarting = False
        self._metrics.ready.set(1)
        logger.warning("the engine is back after %.1f s", time.monotonic() - began)
        self._work_since = None
        self._reload = asyncio.create_task(self._load_again(wanted), name="reload-adapters")

    async def _load_again(self, artifacts: list[Artifact]) -> None:
        for artifact in artifacts:
            await self._pool.preload(artifact)


def _fingerprint(body: Mapping[str, Any]) -> str:
    """Of what the client sent: the salt that a key's requests get on their way to the engine is left out."""
    body = {name: value for name, value in body.items() if name != "cache_salt"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()
