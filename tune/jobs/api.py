"""Everything of this room that HTTP shows, put together over one job store and one files directory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn

from fastapi import APIRouter

from registry import Registry
from registry.errors import CapoError
from tune.jobs.database import Database
from tune.jobs.file_store import FileStore
from tune.jobs.files import FileService, FileStorage
from tune.jobs.permissions.routes import permissions_router
from tune.jobs.permissions.store import PermissionStore
from tune.jobs.routes import files_router, fine_tuning_router, graders_router
from tune.jobs.service import JobService
from tune.jobs.store import JobStore
from tune.jobs.threads import JobThreads
from tune.jobs.uploads.routes import uploads_router
from tune.jobs.uploads.service import UploadService
from tune.jobs.uploads.store import UploadStore
from tune.jobs.webhooks.endpoints import EndpointStore
from tune.jobs.webhooks.outbox import Outbox
from tune.jobs.webhooks.routes import webhooks_router
from tune.jobs.webhooks.sender import WebhookSender

logger = logging.getLogger(__name__)

_RESTART_SECONDS = 5.0
TIDY_SECONDS = 60.0
"""Between two looks for files and uploads whose time is over."""


class TuningApi:
    """The services, their routers, and what runs beside them. Owns nothing: the caller closes the database."""

    def __init__(
        self,
        database: Database,
        storage: FileStorage,
        registry: Registry,
        *,
        base_models: Mapping[str, str] | Callable[[], Mapping[str, str]],
        max_lora_rank: int | None = None,
        max_gpus: int | None = None,
    ) -> None:
        files = FileStore(database)
        self.files = FileService(files, storage)
        uploads = UploadStore(
            database, max_part_bytes=storage.max_part_bytes, max_upload_bytes=storage.max_upload_bytes
        )
        self.uploads = UploadService(uploads, self.files)
        self.permissions = PermissionStore(database)
        self.jobs = JobService(
            JobStore(database),
            files,
            registry,
            self.permissions,
            base_models=base_models,
            max_lora_rank=max_lora_rank,
            max_gpus=max_gpus,
        )
        self.webhook_endpoints = EndpointStore(database)
        self.threads = JobThreads()
        self._sender = WebhookSender(Outbox(database))
        self._registry = registry

    def routers(self) -> list[APIRouter]:
        return [
            files_router(self.files, self.threads),
            uploads_router(self.uploads, self.threads),
            fine_tuning_router(self.jobs, self.threads.store),
            graders_router(),
            permissions_router(self.permissions, self._registry, self.threads.store),
            webhooks_router(self.webhook_endpoints, self.threads.store),
        ]

    def sweep(self) -> None:
        """Clean up what killed processes left behind; for the start of a server. Blocks."""
        self.files.sweep()
        self.uploads.sweep()

    async def run(self) -> None:
        """Send webhooks and remove what has expired, until cancelled; run as a task."""
        await asyncio.gather(_for_ever(self._sender.run), _for_ever(self._tidy))

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            try:
                await self.threads.store.run(self.files.remove_expired)
                await self.threads.store.run(self.uploads.remove_expired)
            except CapoError as error:
                logger.warning("what has expired could not be removed: %s", error)


async def _for_ever(run: Callable[[], Awaitable[None]]) -> NoReturn:
    """Nobody waits for these tasks, so a fault in one of them would end it without a word."""
    while True:
        try:
            await run()
        except Exception:
            logger.exception("a task beside the API failed and starts again")
        await asyncio.sleep(_RESTART_SECONDS)
