"""The half of a service that takes work: files and jobs, and where no engine is beside it, models and aliases too."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from prometheus_client import REGISTRY

from capo.settings import Settings
from capo.workers import max_gpus
from registry import BaseModel, Registry
from serve.catalog import Catalog
from serve.engine_arguments import engine_limits, max_lora_rank
from serve.gate import Gate
from serve.grpc.service_entry import ServiceEntry
from serve.names_service import NamesService
from serve.routes import aliases_router, models_router
from serve.shares import Shares
from tune.grpc import SERVICE_NAME, TuningServicer
from tune.jobs.api import TuningApi
from tune.jobs.database import Database
from tune.jobs.files import FileStorage
from tune.jobs.metrics import JobMetrics
from tune.jobs.settings import files_dir


class ControlSide:
    """Opens the job store; :meth:`close` closes it. Imports no engine."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        base_model: BaseModel,
        vllm_arguments: list[str],
        *,
        shares: Shares,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._base_model = base_model
        self._vllm_arguments = vllm_arguments
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self.database = Database(settings.job_store_url, tenant=settings.organization)
        self._metrics = JobMetrics(self.database)
        self._tasks: list[asyncio.Task[None]] = []
        self.tuning = TuningApi(
            self.database,
            _file_storage(settings),
            registry,
            base_models={base_model.id: settings.model},
            max_lora_rank=max_lora_rank(vllm_arguments),
            max_gpus=max_gpus(settings),
        )
        self.names: NamesService | None = None
        if not settings.role.has_engine:
            limits = engine_limits(base_model.path, vllm_arguments)
            catalog = Catalog(registry, base_model.id, shares=shares)
            self.names = NamesService(catalog, Gate(registry, base_model), limits)

    async def start(self) -> None:
        await asyncio.to_thread(self._metrics.refresh)
        REGISTRY.register(self._metrics)
        self._tasks.append(asyncio.create_task(self._metrics.follow(), name="job-metrics"))
        self._tasks.append(asyncio.create_task(self.tuning.run(), name="tuning-api"))
        if self.names is not None:
            await self.names.start()

    def not_ready_reason(self) -> str | None:
        """Beside an engine, the engine's readiness decides."""
        return None if self.names is None else self.names.not_ready_reason()

    async def drain(self, deadline_seconds: float) -> None:
        """The door waits for requests (:meth:`capo.access_side.AccessSide.drain`); here only readiness ends."""
        if self.names is not None:
            self.names.drain()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.names is not None:
            await self.names.stop()

    def routers(self) -> list[APIRouter]:
        self.tuning.sweep()  # what an upload left behind that was cut off by a crash
        return control_routers(self.tuning, self.names)

    def grpc_services(self) -> list[ServiceEntry]:
        return control_grpc_services(self.tuning)

    def close(self) -> None:
        self.database.close()


def control_routers(tuning: TuningApi, names: NamesService | None) -> list[APIRouter]:
    """Every route of this half; those that tests compose too, so that none is left out there."""
    routers = tuning.routers()
    if names is not None:
        routers += [models_router(names.catalog), aliases_router(names.aliases, names.catalog)]
    return routers


def control_grpc_services(tuning: TuningApi) -> list[ServiceEntry]:
    """Likewise, of the gRPC server."""
    return [ServiceEntry(SERVICE_NAME, TuningServicer(tuning.jobs, tuning.threads.store).add_to)]


def _file_storage(settings: Settings) -> FileStorage:
    return FileStorage(
        files_dir(settings.data_dir), max_file_bytes=settings.max_file_bytes, max_file_rows=settings.max_file_rows
    )
