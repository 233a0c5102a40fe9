"""The SQLite file of a job store."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy.pool import QueuePool

from registry.errors import InvalidRequestError, StorageError, UnavailableError
from tests.tune.jobs.support import Place, add_file_row
from tune.jobs.database import Database, sqlite_url


class TestTheFile:
    def test_commits_survive_a_power_cut_and_readers_do_not_block_writers(self, tmp_path: Path) -> None:
        database = Database(sqlite_url(tmp_path / "own.db"))
        with database.read() as connection:
            pragmas = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            }
        database.close()
        assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}

    def test_other_users_cannot_read_it(self, tmp_path: Path) -> None:
        Database(sqlite_url(tmp_path / "own.db")).close()
        assert (tmp_path / "own.db").stat().st_mode & 0o077 == 0

    def test_a_second_opening_in_one_process_takes_nothing_from_the_first(self, place: Place) -> None:
        """A process that comes and goes removes the write-ahead log if it finds no locks of others."""
        second = Database(place.database_url)
        code = (
            "import sys; from tests.tune.jobs.support import TENANT, add_file_row\n"
            "from tune.jobs.database import Database; from tune.jobs.file_store import FileStore\n"
            "database = Database(sys.argv[1]); add_file_row(FileStore(database, tenant=TENANT)); database.close()\n"
        )
        subprocess.run([sys.executable, "-c", code, place.database_url], check=True)
        add_file_row(place.file_rows)
        assert (place.directory / "jobs.db-wal").exists()
        query = "SELECT count(*) FROM files"
        script = f"import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('{query}').fetchone())"
        command = [sys.executable, "-W", "ignore", "-c", script, str(place.directory / "jobs.db")]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "2\n"
        second.close()

    def test_a_store_of_a_newer_capo_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "newer.db"
        Database(sqlite_url(path)).close()
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.close()
        with pytest.raises(InvalidRequestError, match="schema version '9999'"):
            Database(sqlite_url(path))

    @pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "not a url"])
    def test_a_url_that_workers_could_not_share_is_refused(self, url: str) -> None:
        with pytest.raises(InvalidRequestError):
            Database(url)

    def test_a_file_that_is_no_database_is_a_storage_error(self, tmp_path: Path) -> None:
        path = tmp_path / "text.db"
        path.write_text("this is not SQLite, and long enough to be looked at" * 100)
        with pytest.raises(StorageError):
            Database(sqlite_url(path))

    def test_many_processes_may_create_it_at_once(self, tmp_path: Path) -> None:
        url = sqlite_url(tmp_path / "shared.db")
        opened: list[Database] = []
        threads = [threading.Thread(target=lambda: opened.append(Database(url))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 8
        for database in opened:
            database.close()


def test_more_threads_than_connections_are_told_that_the_store_is_busy(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place.database._engine.pool, "_timeout", 0.01)
    pool = place.database._engine.pool
    assert isinstance(pool, QueuePool)
    with contextlib.ExitStack() as held:
        for _ in range(pool.size() + pool._max_overflow):
            held.enter_context(place.database.read())
        with pytest.raises(UnavailableError, match="busy"):
            held.enter_context(place.database.read())
