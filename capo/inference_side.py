"""The half of a service that answers: engine, adapter pool, catalog, and the routes over them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from fastapi import APIRouter
from prometheus_client import REGISTRY

from capo.log_format import LogLevel
from capo.settings import Settings
from registry import BaseModel, Registry
from serve.adapter_imports import AdapterImports
from serve.catalog import Catalog
from serve.engine_arguments import Choice
from serve.engine_arguments import choose as choose_engine_arguments
from serve.gate import Gate
from serve.import_folder import ImportFolder
from serve.limits import Limits
from serve.lora_info import LoraRequestsInfo, names_of
from serve.metrics import Metrics
from serve.pool import AdapterPool
from serve.routes import adapters_router, inference_router, models_router, vllm_adapters_router
from serve.service import ServingService
from serve.shares import Shares

logger = logging.getLogger(__name__)


def open_registry(settings: Settings) -> Registry:
    """The registry, writable where it can be. A replica whose mount is read-only only follows it."""
    path = settings.registry_path
    is_read_only = not settings.role.has_jobs and path.is_dir() and not os.access(path, os.W_OK)
    return Registry(path, read_only=is_read_only)


class InferenceSide:
    """Builds everything; nothing runs before ``serving.start()``. Call :func:`serve.engine_process.prepare` before."""

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
        self._base_model = base_model
        use_gpu = Path("/dev/nvidiactl").exists()
        self.choices: list[Choice] = choose_engine_arguments(
            base_model.path, use_gpu=use_gpu, user_arguments=vllm_arguments
        )
        arguments = [*(part for choice in self.choices for part in choice.argv), *vllm_arguments]
        if settings.log_level is not LogLevel.DEBUG:
            arguments.insert(0, "--no-use-tqdm-on-load")  # a progress bar in a log
        catalog = Catalog(registry, base_model.id, shares=shares)
        self.serving = self._build(registry, catalog, arguments)

    def _build(self, registry: Registry, catalog: Catalog, arguments: list[str]) -> ServingService:
        # Importing the engine costs seconds, and a process without one must not.
        from serve.engine import VllmEngine

        settings, base_model = self._settings, self._base_model
        engine = VllmEngine(
            str(base_model.path),
            base_model.id,
            arguments,
            slowest_trial_seconds=settings.max_constraint_seconds,
        )
        metrics = Metrics(max_adapters=settings.max_metric_adapters)
        pool = AdapterPool(engine, Gate(registry, base_model), metrics, max_wait_seconds=settings.adapter_wait_seconds)
        limits = Limits(
            max_in_flight=settings.max_in_flight,
            max_in_flight_per_model=settings.max_in_flight_per_model,
            engine_stall_seconds=settings.engine_stall_seconds,
            alias_warm_seconds=settings.alias_warm_seconds,
            max_n=settings.max_n,
            max_logprobs=settings.max_logprobs,
            max_stop_strings=settings.max_stop_strings,
            max_prompts=settings.max_prompts,
            max_messages=settings.max_messages,
            max_constraint_bytes=settings.max_constraint_bytes,
        )
        return ServingService(
            engine=engine,
            catalog=catalog,
            pool=pool,
            metrics=metrics,
            limits=limits,
            pins=settings.pin,
        )

    async def start(self) -> None:
        """Returns when requests can be answered."""
        serving = self.serving
        await serving.start()
        REGISTRY.register(
            LoraRequestsInfo(
                lambda: tuple(serving.pool.residents()),
                lambda revision: names_of(serving.catalog.snapshot.aliases.values(), revision),
                serving.engine.limits.max_loras,
            )
        )

    def not_ready_reason(self) -> str | None:
        return self.serving.not_ready_reason()

    async def drain(self, deadline_seconds: float) -> None:
        if left := await self.serving.drain(deadline_seconds):
            logger.warning("%d requests were still running at the drain deadline", left)

    async def stop(self) -> None:
        await self.serving.stop()

    def close(self) -> None:
        """Nothing is left open that the process's end would not close."""

    def routers(self) -> list[APIRouter]:
        import_dir = self._settings.import_dir
        import_folder = ImportFolder(import_dir) if import_dir is not None else None
        return inference_routers(self.serving, AdapterImports(self.serving, self._base_model, import_folder))


def inference_routers(serving: ServingService, imports: AdapterImports) -> list[APIRouter]:
    """Every route of this half; those that tests compose too, so that none is left out there."""
    return [
        inference_router(serving),
        models_router(serving.catalog),
        adapters_router(serving),
        vllm_adapters_router(imports),
    ]
