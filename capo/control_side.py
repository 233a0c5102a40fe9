"""The half of a service that takes work: files and jobs, and where no engine is beside it, models and aliases too."""

from __future__ import annotations

from fastapi import APIRouter

from capo.settings import Settings
from registry import BaseModel, Registry
from serve.catalog import Catalog
from serve.engine_arguments import engine_limits, max_lora_rank
from serve.gate import Gate
from serve.names_service import NamesService
from serve.routes import aliases_router, models_router
from tune.jobs.database import Database
from tune.jobs.file_store import FileStore
from tune.jobs.files import FileService, FileStorage
from tune.jobs.routes import files_router, fine_tuning_router
from tune.jobs.service import JobService
from tune.jobs.settings import files_dir
from tune.jobs.store import JobStore


class ControlSide:
    """Opens the job store; :meth:`close` closes it. Imports no engine."""

    def __init__(
        self, settings: Settings, registry: Registry, base_model: BaseModel, vllm_arguments: list[str]
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._base_model = base_model
        self._vllm_arguments = vllm_arguments
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self._database = Database(settings.job_store_url, tenant=settings.organization)
        self.names: NamesService | None = None
        if not settings.role.has_engine:
            limits = engine_limits(base_model.path, vllm_arguments)
            self.names = NamesService(Catalog(registry, base_model.id), Gate(registry, base_model), limits)

    async def start(self) -> None:
        if self.names is not None:
            await self.names.start()

    def not_ready_reason(self) -> str | None:
        """Beside an engine, the engine's readiness decides."""
        return None if self.names is None else self.names.not_ready_reason()

    async def drain(self, deadline_seconds: float) -> None:
        """Its requests are short; refusing new ones is all there is to do."""
        if self.names is not None:
            self.names.drain()

    async def stop(self) -> None:
        if self.names is not None:
            await self.names.stop()

    def routers(self) -> list[APIRouter]:
        files = FileStore(self._database)
        file_service = FileService(files, FileStorage(files_dir(self._settings.data_dir)))
        file_service.sweep()  # what an upload left behind that was cut off by a crash
        jobs = JobService(
            JobStore(self._database),
            files,
            self._registry,
            base_models={self._base_model.id: self._settings.model},
            max_lora_rank=max_lora_rank(self._vllm_arguments),
        )
        routers = [files_router(file_service), fine_tuning_router(jobs)]
        if self.names is not None:
            routers += [models_router(self.names.catalog), aliases_router(self.names.aliases, self.names.catalog)]
        return routers

    def close(self) -> None:
        self._database.close()
