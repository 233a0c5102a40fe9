"""The tables that the chain of migrations makes, against the tables that the code speaks of."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from tests.tune.jobs.support import add_file_row, new_job
from tests.tune.jobs.test_job_metrics import figures
from tune.jobs import migrations, schema
from tune.jobs.database import Database, sqlite_url
from tune.jobs.file_store import FileStore
from tune.jobs.metrics import JobMetrics
from tune.jobs.store import JobStore

SCRIPTS = ScriptDirectory(str(Path(migrations.__file__).parent))


def test_the_chain_has_one_end_which_the_code_names() -> None:
    assert SCRIPTS.get_heads() == [migrations.HEAD]


def test_the_chain_ends_in_the_tables_that_the_code_speaks_of(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "jobs.db")
    Database(url).close()
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": False})
        assert compare_metadata(context, schema.metadata) == []
    engine.dispose()


@pytest.fixture
def old_store(tmp_path: Path) -> Path:
    """As the first Capo wrote it: version 1, with a file and a job, and no trace of migrations."""
    path = tmp_path / "old.db"
    engine = create_engine(sqlite_url(path))
    with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        script = SCRIPTS.get_revision("0001")
        assert script is not None
        script.module.upgrade()
        connection.exec_driver_sql("CREATE TABLE schema_info (version INTEGER PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO schema_info VALUES (1)")
        connection.exec_driver_sql(
            "INSERT INTO files (id, filename, purpose, size_bytes, sha256, rows, created_at) "
            "VALUES ('file-old', 'rows.jsonl', 'fine-tune', 10, 'aa', 20, 1700000000)"
        )
        connection.exec_driver_sql(
            "INSERT INTO jobs (id, status, model, organization_id, training_file, seed, hyperparameters, extensions, "
            "reserved_name, created_at, result_files, epoch, heartbeats, lease_seconds, attempts, not_before, "
            "cancel_requested, last_event) VALUES ('ftjob-old', 'queued', 'capo-tiny', 'capo', 'file-old', 7, "
            '\'{"n_epochs": 1, "batch_size": 2, "learning_rate_multiplier": 1.0}\', \'{}\', '
            "'ft:capo-tiny:capo::old', 1700000000, '[]', 0, 0, 0.0, 0, 0.0, 0, 0)"
        )
    engine.dispose()
    return path


def test_an_old_store_keeps_its_jobs_and_files(old_store: Path) -> None:
    with sqlite3.connect(old_store) as connection:
        connection.execute("UPDATE jobs SET attempts = 2")
    connection.close()
    database = Database(sqlite_url(old_store), tenant="house")
    metrics = JobMetrics(database, clock=lambda: 1_700_000_060.0)
    metrics.refresh()
    job = JobStore(database).job("ftjob-old")
    file = FileStore(database).get("file-old")
    found = figures(metrics)
    database.close()
    assert (job.status, job.method, job.priority, job.paused) == ("queued", "supervised", 0, False)
    assert (job.hyperparameters.batch_size, job.hyperparameters.beta) == (2, None)
    assert (file.rows, file.row_format) == (20, "chat")
    assert (job.tenant, file.tenant) == ("capo", "house")
    assert (found["capo_job_attempts_total"], found["capo_job_oldest_wait_seconds"]) == (2, 60)


def test_processes_that_start_at_once_upgrade_one_store_once(old_store: Path) -> None:
    code = f"from tune.jobs.database import Database; Database({sqlite_url(old_store)!r}).close()"
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda _: subprocess.run([sys.executable, "-c", code], check=False), range(3)))
    assert [run.returncode for run in runs] == [0, 0, 0]
    with sqlite3.connect(old_store) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(migrations.HEAD,)]
    connection.close()


def test_opening_a_store_that_is_up_to_date_does_not_import_alembic(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "jobs.db")
    database = Database(url)
    JobStore(database, tenant="acme").create_job(new_job(add_file_row(FileStore(database))))
    database.close()
    code = (
        f"import sys; from tune.jobs.database import Database; Database({url!r}).close(); "
        "assert 'alembic' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
