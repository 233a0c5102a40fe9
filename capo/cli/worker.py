"""``capo worker``: works fine-tuning jobs from the job store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capo.cli.serve import read_settings


def add_to(app: typer.Typer) -> None:
    app.command(name="worker")(worker)


def worker(
    model: Annotated[str | None, typer.Option(help="The base model that jobs may name.")] = None,
    registry: Annotated[Path | None, typer.Option(help="Registry directory; default DATA_DIR/registry.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where Capo writes; default ./capo-data.")] = None,
    threads: Annotated[int | None, typer.Option(help="OpenMP threads of a job.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs it offers; default those it sees.")] = None,
    job: Annotated[str | None, typer.Option(help="Work this job once, and end; default: whatever waits.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    parent_pid: Annotated[int | None, typer.Option(help="End when this parent process ends.")] = None,
) -> None:
    """Work fine-tuning jobs until SIGTERM; a running job then goes back to the queue.

    Launchers start one for each job, with --job.
    """
    from capo.logs import configure_logging
    from registry import Registry, locate_base_model
    from tune.jobs.gpus import visible_gpus
    from tune.jobs.settings import WorkerSettings
    from tune.jobs.worker import run_worker

    settings = read_settings(
        model=model,
        registry_dir=registry,
        data_dir=data_dir,
        worker_threads=threads,
        worker_gpus=gpus,
        log_level=log_level,
    )
    configure_logging(settings.log_level, settings.log_format)
    base_model = locate_base_model(settings.model, Registry(settings.registry_path))
    run_worker(
        WorkerSettings(
            database_url=settings.job_store_url,
            data_dir=settings.data_dir,
            registry_dir=settings.registry_path,
            organization=settings.organization,
            base_models={base_model.id: settings.model},
            num_threads=settings.worker_threads,
            gpus=visible_gpus() if settings.worker_gpus is None else settings.worker_gpus,
            max_running_per_tenant=settings.max_running_jobs_per_tenant,
            otlp_endpoint=settings.otlp_endpoint,
            stop_grace_seconds=settings.worker_stop_seconds,
            job_id=job,
            parent_pid=parent_pid,
        )
    )
