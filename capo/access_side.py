"""The part of a service that decides who may come in; every role has it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from capo.access import AccessMetrics, Door, require_guard
from capo.audit import AuditLog, AuditWriter
from capo.keys.ring import KeyRing
from capo.keys.store import KeyStore
from capo.settings import Settings
from registry.threads import Threads
from tune.jobs.database import Database
from tune.jobs.permissions.store import PermissionStore

logger = logging.getLogger(__name__)

_PERMISSION_THREADS = 4
"""Requests for shared models ask, each with one indexed query of a millisecond or two."""


class AccessSide:
    """Reads the keys, from the job store's database, before anything else is built.

    Raises:
        InvalidRequestError: the service would be open to other machines, and nobody said that it may.
        StorageError, UnavailableError: the keys cannot be read. A service does not start without knowing them.
    """

    def __init__(self, settings: Settings) -> None:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self._database = Database(settings.job_store_url, tenant=settings.organization)
        self._ring = KeyRing(KeyStore(self._database))
        self._ring.read()
        require_guard(settings.host, self._ring, allow_unauthenticated=settings.allow_unauthenticated)
        self._audit = AuditWriter(AuditLog(settings.data_dir, settings.audit_place))
        self.door = Door(
            self._ring,
            house=settings.organization,
            metrics=AccessMetrics(),
            audit=self._audit,
        )
        self._permissions = PermissionStore(self._database)
        self._permission_threads = Threads("permissions", _PERMISSION_THREADS)
        self._following: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._following = asyncio.create_task(self._ring.follow(), name="keys")

    async def is_shared_with(self, model: str, tenant: str) -> bool:
        """See :class:`serve.shares.Shares`, as for the next one."""
        return await self._permission_threads.run(self._permissions.is_shared_with, model, tenant)

    async def shared_with(self, tenant: str) -> Collection[str]:
        return await self._permission_threads.run(self._permissions.shared_with, tenant)

    async def drain(self, deadline_seconds: float) -> None:
        """Let nobody in any more but for what a service that ends still answers, and wait for who is inside."""
        if left := await self.door.drain(deadline_seconds):
            logger.warning("%d requests beside inference were still running at the drain deadline", left)

    async def stop(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        self._database.close()
        self._audit.close()
