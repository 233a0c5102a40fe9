"""A worker of one job with a stand-in for training. Arguments: a directory, the collector's endpoint, the job."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.serve.running import BASE
from tests.tune.jobs import standins
from tune.jobs.database import sqlite_url
from tune.jobs.settings import WorkerSettings
from tune.jobs.worker import run_worker

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    settings = WorkerSettings(
        database_url=sqlite_url(directory / "jobs.sqlite"),
        data_dir=directory,
        registry_dir=directory / "registry",
        base_models={BASE: BASE},
        otlp_endpoint=sys.argv[2],
        job_id=sys.argv[3],
    )
    run_worker(settings, standins.trains_well)
