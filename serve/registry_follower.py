"""What a change of the registry means for the running service: metrics, pins, withdrawals, and loads ahead of requests.

What requests are likely to ask for next is loaded before they do, one adapter at a time and only into slots that are
free: what was published while we run, and what aliases serve. Where no slot is free for what an alias serves, the gate
looks at it all the same, so that a refusal is known before its traffic comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from registry import Artifact, errors
from serve.catalog import Catalog, Snapshot
from serve.metrics import Metrics
from serve.pins import Pins
from serve.pool import AdapterPool
from serve.resident import AdapterState

logger = logging.getLogger(__name__)


class RegistryFollower:
    """Follows ``catalog`` from its construction on; nothing is loaded before :meth:`run`, which is a task."""

    def __init__(self, catalog: Catalog, pool: AdapterPool, pins: Pins, metrics: Metrics) -> None:
        self._catalog = catalog
        self._pool = pool
        self._pins = pins
        self._metrics = metrics
        self._is_running = False
        self._ahead: dict[str, bool] = {}
        """Revisions to load, the next one first, and whether an alias serves them."""
        self._has_work = asyncio.Event()
        catalog.on_change(self._follow)

    async def run(self) -> None:
        """Load ahead, for ever; at first what aliases serve already, the newest aliases first, as slots are free."""
        self._ahead = dict.fromkeys(self._served_at_start(), True)
        self._is_running = True
        while True:
            self._has_work.clear()
            while self._ahead:
                revision = next(iter(self._ahead))
                is_served = self._ahead.pop(revision)
                artifact = self._catalog.snapshot.artifacts.get(revision)
                if artifact is not None and artifact.manifest.kind == "lora":
                    await self._load(artifact, is_served=is_served)
            await self._has_work.wait()

    async def _load(self, artifact: Artifact, *, is_served: bool) -> None:
        try:
            with contextlib.suppress(errors.CapoError):  # the pool remembers a refusal; anything else is tried on use
                if not await self._pool.preload(artifact) and is_served:
                    await self._pool.vet(artifact)
        except Exception:
            # Our bug; but without this task nothing would be loaded ahead any more.
            logger.exception("loading %s ahead of requests failed; going on", artifact.revision)

    def _served_at_start(self) -> list[str]:
        snapshot = self._catalog.snapshot
        aliases = sorted(snapshot.aliases.values(), key=lambda alias: -alias.updated_at)
        # A write-once name is the result of a job; there may be thousands, and most are not called any more.
        served = [a.revision for alias in aliases if not alias.write_once for a in snapshot.served_by(alias.alias)]
        cold = [r for r in dict.fromkeys(served) if self._pool.status(r).state is AdapterState.AVAILABLE]
        return cold[: self._pool.num_free_slots]

    def _follow(self, old: Snapshot, new: Snapshot) -> None:
        self._count_flips(old, new)
        self._pins.follow()
        for revision in new.damaged.keys() - old.damaged.keys():
            error = new.damaged[revision].error
            self._metrics.adapter_refused(error.code)
            logger.warning("%s is no artifact and means nothing: %s", revision, error.message)
        for revision in old.artifacts.keys() - new.artifacts.keys():
            self._pool.withdraw(revision)
        for name in {a.name for a in old.artifacts.values()} - {a.name for a in new.artifacts.values()}:
            self._metrics.forget_adapter(name)
        if self._is_running:
            for alias, record in new.aliases.items():
                before = old.aliases.get(alias)
                if before is None or (before.revision, before.canary) != (record.revision, record.canary):
                    self._ahead |= {artifact.revision: True for artifact in new.served_by(alias)}
            for revision in sorted(new.artifacts.keys() - old.artifacts.keys()):
                self._ahead.setdefault(revision, False)
            self._has_work.set()

    def _count_flips(self, old: Snapshot, new: Snapshot) -> None:
        for alias, record in new.aliases.items():
            before = old.aliases.get(alias)
            if before is not None and before.revision != record.revision:
                self._metrics.alias_flipped()
        for alias, record in old.aliases.items():
            after = new.aliases.get(alias)
            now = None if after is None or after.canary is None else after.canary.revision
            if record.canary is not None and record.canary.revision != now:
                self._metrics.canary_ended(alias)
