"""Models and aliases of a registry in a process without an engine: what names mean, and changing it.

Replicas with an engine follow such changes as they come. An alias is vetted here by the gate's checks that need no
engine; whether its adapter answers as it was trained to, each replica finds out when it loads it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from registry import Artifact
from serve import readiness
from serve.alias_control import AliasControl
from serve.catalog import Catalog
from serve.engine_api import EngineLimits
from serve.gate import Gate


class NamesService:
    """Owns the task that follows the registry, between :meth:`start` and :meth:`stop`.

    ``limits`` are those of the replicas' engines.
    """

    def __init__(self, catalog: Catalog, gate: Gate, limits: EngineLimits) -> None:
        self.catalog = catalog
        self.aliases = AliasControl(
            catalog, _EnginelessVetting(gate, limits), require_ready=self.require_ready, warm_seconds=0.0
        )
        self._watch: asyncio.Task[None] | None = None
        self._is_draining = False

    async def start(self) -> None:
        """Read the registry and begin to follow it."""
        await self.catalog.refresh()
        self._watch = asyncio.create_task(self.catalog.watch(), name="registry-watch")

    def not_ready_reason(self) -> str | None:
        """Why requests should not come here now; ``None`` when they may."""
        if self._is_draining:
            return "draining"
        return "starting" if self._watch is None else None

    def require_ready(self) -> None:
        """Raises:
        UnavailableError: requests should not come here now.
        """
        readiness.require(self.not_ready_reason())

    def drain(self) -> None:
        self._is_draining = True

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)


class _EnginelessVetting:
    """What :class:`AliasControl` asks of a pool, as far as it can be known without an engine."""

    def __init__(self, gate: Gate, limits: EngineLimits) -> None:
        self._gate = gate
        self._limits = limits

    async def vet(self, artifact: Artifact) -> None:
        await self._gate.check(artifact, self._limits)

    async def warm(self, artifacts: Iterable[Artifact], seconds: float) -> bool:
        return False
