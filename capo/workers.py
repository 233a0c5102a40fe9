"""The launcher that the settings ask for, told what this service's workers need to know."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from capo.roles import LauncherKind
from capo.settings import Settings
from registry.errors import InvalidRequestError
from tune.jobs.database import Database
from tune.jobs.gpus import VISIBLE, divide_devices, visible_devices
from tune.jobs.launchers import Launcher
from tune.jobs.launchers.cluster import Cluster
from tune.jobs.launchers.dispatch import ClusterLauncher
from tune.jobs.launchers.kubernetes import KubernetesCluster
from tune.jobs.launchers.kubernetes_api import KubernetesAccess
from tune.jobs.launchers.kubernetes_job import DATA_PATH, KubernetesSettings
from tune.jobs.launchers.local import LocalLauncher
from tune.jobs.launchers.ray import RayCluster, RaySettings
from tune.jobs.limits import MAX_GPUS
from tune.jobs.queue import WorkQueue
from tune.jobs.store import JobStore


def make_launcher(settings: Settings, environment: dict[str, str], database: Database | None) -> Launcher:
    """``environment`` is the one this process was started with: what vLLM adds to it later must not reach training.

    ``database`` is the job store; ``None`` in a process without jobs, which launches nothing.

    Raises:
        InvalidRequestError: the launcher cannot work here.
    """
    if database is None or settings.launcher is LauncherKind.LOCAL:
        return LocalLauncher(
            _local_command(settings),
            _local_environments(settings, environment),
            stop_grace_seconds=settings.worker_stop_seconds,
        )
    return ClusterLauncher(
        _CLUSTERS[settings.launcher](settings),
        WorkQueue(
            database,
            gpus=max_gpus(settings) or 0,
            max_running_per_tenant=settings.max_running_jobs_per_tenant,
        ),
        JobStore(database),
        max_launched=settings.max_launched_jobs,
    )


def max_gpus(settings: Settings) -> int | None:
    """The GPUs of the largest worker that this service's jobs may meet; ``None``: it cannot know."""
    if settings.worker_gpus is not None:
        return settings.worker_gpus
    if settings.launcher is not LauncherKind.LOCAL:
        return MAX_GPUS  # what a cluster has is for the cluster to say
    if not settings.num_workers:
        return None
    return max(map(len, (share or () for share in _device_shares(settings))))


def _device_shares(settings: Settings) -> list[tuple[str, ...] | None]:
    return divide_devices(visible_devices(), workers=settings.num_workers, gpus=settings.worker_gpus)


def _kubernetes(settings: Settings) -> Cluster:
    assert settings.kubernetes_image is not None, "the settings were checked"
    assert settings.kubernetes_volume_claim is not None, "the settings were checked"
    registry = {"CAPO_REGISTRY_DIR": _registry_on_volume(settings)}
    return KubernetesCluster(
        KubernetesAccess.in_cluster(),
        KubernetesSettings(
            image=settings.kubernetes_image,
            volume_claim=settings.kubernetes_volume_claim,
            secret=settings.kubernetes_secret,
            environment=cluster_environment(settings) | registry,
            cpu=settings.kubernetes_cpu,
            memory=settings.kubernetes_memory,
            stop_grace_seconds=settings.worker_stop_seconds,
        ),
    )


def _registry_on_volume(settings: Settings) -> str:
    """Where a launched worker finds the service's registry: it has the volume of DATA_DIR, at a place of its own."""
    data_dir, registry_dir = settings.data_dir.resolve(), settings.registry_path.resolve()
    if not registry_dir.is_relative_to(data_dir):
        raise InvalidRequestError(
            f"registry_dir={settings.registry_dir} is outside of data_dir={settings.data_dir}, and with "
            "launcher=kubernetes workers have the volume of data_dir alone; put the registry below it",
            param="registry_dir",
        )
    return str(Path(DATA_PATH, registry_dir.relative_to(data_dir)))


def _ray(settings: Settings) -> Cluster:
    assert settings.ray_address is not None, "the settings were checked"
    paths = {
        "CAPO_DATA_DIR": str(settings.data_dir.absolute()),
        "CAPO_REGISTRY_DIR": str(settings.registry_path.absolute()),
    }
    return RayCluster(RaySettings(address=settings.ray_address, environment=cluster_environment(settings) | paths))


_CLUSTERS: dict[LauncherKind, Callable[[Settings], Cluster]] = {
    LauncherKind.KUBERNETES: _kubernetes,
    LauncherKind.RAY: _ray,
}


def cluster_environment(settings: Settings) -> dict[str, str]:
    """Without CAPO_DATABASE_URL, which may hold a password: everybody who sees the cluster's jobs sees this."""
    given = {
        "CAPO_MODEL": settings.model,
        "CAPO_LOG_LEVEL": settings.log_level,
        "CAPO_LOG_FORMAT": settings.log_format,
        "CAPO_ORGANIZATION": settings.organization,
        "CAPO_WORKER_STOP_SECONDS": str(settings.worker_stop_seconds),
    }
    if settings.otlp_endpoint is not None:
        given["CAPO_OTLP_ENDPOINT"] = settings.otlp_endpoint
    if settings.worker_threads is not None:
        given["CAPO_WORKER_THREADS"] = str(settings.worker_threads)
    if settings.max_running_jobs_per_tenant is not None:
        given["CAPO_MAX_RUNNING_JOBS_PER_TENANT"] = str(settings.max_running_jobs_per_tenant)
    return given


def _local_command(settings: Settings) -> list[str]:
    command = [
        sys.executable, "-m", "capo", "worker",
        "--data-dir", str(settings.data_dir.absolute()),
        "--registry", str(settings.registry_path.absolute()),
        "--model", settings.model,
        "--log-level", settings.log_level,
        "--parent-pid", str(os.getpid()),
    ]  # fmt: skip
    if settings.worker_threads is not None:
        command += ["--threads", str(settings.worker_threads)]
    if settings.worker_gpus is not None:
        command += ["--gpus", str(settings.worker_gpus)]
    return command


def _local_environments(settings: Settings, environment: dict[str, str]) -> list[dict[str, str]]:
    """Of each worker, with the GPUs that are its own."""
    given = _local_environment(settings, environment)
    shares = _device_shares(settings)
    return [given if share is None else given | {VISIBLE: ",".join(share)} for share in shares]


def _local_environment(settings: Settings, environment: dict[str, str]) -> dict[str, str]:
    given = dict(environment) | {
        "CAPO_LOG_FORMAT": settings.log_format,
        "CAPO_WORKER_STOP_SECONDS": str(settings.worker_stop_seconds),
    }
    if settings.otlp_endpoint is not None:
        given["CAPO_OTLP_ENDPOINT"] = settings.otlp_endpoint
    if settings.database_url is not None:  # it may hold a password, and arguments are for all to see
        given["CAPO_DATABASE_URL"] = settings.database_url
    if settings.max_running_jobs_per_tenant is not None:
        given["CAPO_MAX_RUNNING_JOBS_PER_TENANT"] = str(settings.max_running_jobs_per_tenant)
    return given
