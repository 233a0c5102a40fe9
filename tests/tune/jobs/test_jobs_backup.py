"""The runbook's backup, taken with its own commands while everything runs, and restored somewhere else."""

from __future__ import annotations

import hashlib
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.programs import program
from tests.tune.jobs import standins
from tests.tune.jobs.postgres import new_database
from tests.tune.jobs.support import Place, chat_rows, open_place, wait_until
from tests.tune.jobs.test_jobs_worker import wait_for, worker
from tune.jobs.database import sqlite_url
from tune.jobs.rows import new_id


@contextmanager
def uploads_that_go_on(place: Place) -> Iterator[None]:
    stop = threading.Event()

    def keep_uploading() -> None:
        number = 0
        while not stop.wait(0.01):
            place.upload(chat_rows(12, first=number))
            number += 12

    thread = threading.Thread(target=keep_uploading)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plain_url(database_url: str) -> str:
    """As libpq's programs want it."""
    return database_url.replace("postgresql+psycopg", "postgresql")


def back_up(place: Place, target: Path) -> None:
    """The job store, then the files, then the registry: each names only what is copied after it."""
    target.mkdir()
    if place.database_url.startswith("sqlite"):
        run(program("sqlite3"), str(place.directory / "jobs.db"), f".backup {target / 'jobs.db'}")
    else:
        run(program("pg_dump"), "--format=custom", f"--file={target / 'jobs.dump'}", plain_url(place.database_url))
    run("cp", "--archive", str(place.data_dir / "files"), str(target / "files"))
    run("cp", "--archive", str(place.registry_dir), str(target / "registry"))


def restore(backup: Path, directory: Path, request: pytest.FixtureRequest) -> Place:
    (directory / "data").mkdir(parents=True)
    run("cp", "--archive", str(backup / "files"), str(directory / "data/files"))
    run("cp", "--archive", str(backup / "registry"), str(directory / "registry"))
    if (backup / "jobs.db").exists():
        run("cp", str(backup / "jobs.db"), str(directory / "jobs.db"))
        return open_place(directory, database_url=sqlite_url(directory / "jobs.db"))
    url = new_database(request.getfixturevalue("postgres"), new_id("test_", 8))
    run(program("pg_restore"), "--no-owner", "--exit-on-error", f"--dbname={plain_url(url)}", str(backup / "jobs.dump"))
    return open_place(directory, database_url=url)


def test_a_backup_taken_while_jobs_run_and_files_arrive_is_whole(
    any_place: Place, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = any_place
    file_id = place.upload(chat_rows(20)).id
    done = place.queue_job(file_id, suffix="done")
    with worker(place, standins.trains_well):
        wait_for(place, done.id, "succeeded")
    running = place.queue_job(file_id, suffix="running")
    queued = place.queue_job(file_id, suffix="queued")
    with worker(place, standins.hangs) as process:
        wait_for(place, running.id, "running")
        with uploads_that_go_on(place):
            wait_until(lambda: len(place.file_rows.page(after=None, limit=100).records) > 10, seconds=30)
            back_up(place, tmp_path / "backup")
        process.kill()
    restored = restore(tmp_path / "backup", tmp_path / "elsewhere", request)
    try:
        files = restored.file_rows.page(after=None, limit=10_000).records
        assert len(files) > 10
        for file in files:
            content = restored.files.storage.path(file.id).read_bytes()
            assert (hashlib.sha256(content).hexdigest(), len(content)) == (file.sha256, file.size_bytes)
        kept = restored.store.job(done.id)
        assert kept.status == "succeeded"
        assert restored.registry.verify(str(kept.fine_tuned_model)) == []
        assert restored.store.job(running.id).status == "running"
        with worker(restored, standins.trains_well):
            for job in (running, queued):
                ended = wait_for(restored, job.id, "succeeded", "failed")
                assert ended.error is None
                assert restored.registry.verify(str(ended.fine_tuned_model)) == []
    finally:
        restored.database.close()
