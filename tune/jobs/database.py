"""Opening the job store's database, and its two kinds of transaction.

Any SQLAlchemy URL is taken. A SQLite file is opened for several processes at once: write-ahead log,
``synchronous=FULL`` so that a commit survives a power cut, and ``BEGIN IMMEDIATE`` for writes so that two
writers wait for each other instead of failing half-way (https://sqlite.org/lang_transaction.html). The
write-ahead log needs all processes on one host (https://sqlite.org/wal.html); more hosts need PostgreSQL.

Calls block; on an event loop they belong in a thread. After a fork the child opens a new
:class:`Database`, and the parent calls :meth:`Database.close` before the fork, because neither a SQLite
connection nor a socket may cross it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFreeError

from registry.errors import CapoError, InvalidRequestError, StorageError, UnavailableError
from tune.jobs import migrations
from tune.jobs.database_url import sqlite_url

__all__ = ["Database", "sqlite_url"]

BUSY_TIMEOUT_SECONDS = 30.0
"""How long a writer waits for another. Writes take milliseconds, so this is reached only by a stuck disk."""

CONNECT_TIMEOUT_SECONDS = 5
"""A PostgreSQL server in reach answers within milliseconds; this is a lost packet, sent twice again."""
STATEMENT_TIMEOUT_SECONDS = BUSY_TIMEOUT_SECONDS
"""For each statement of PostgreSQL, its wait for locks included. All of ours take milliseconds, lists of ten thousand
rows less than a second; without an end, one that hangs would keep its thread for ever. Migrations have none."""
_SILENCE_SECONDS = 10
"""After so long without a word from a PostgreSQL server TCP asks whether its host is there, three times; else a host
that vanished would be waited for by the hour."""

_DISK_ERRORS = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
}
_WRITE = "capo_write"


class Database:
    """One process's access to the job store; safe to use from many threads.

    ``tenant`` is given what a store holds from before there were tenants.

    Raises:
        InvalidRequestError: the URL cannot be used, or the store was written by a newer Capo.
        StorageError: the file cannot be opened or written.
        UnavailableError: the database server does not answer.
    """

    def __init__(self, url: str, *, tenant: str = "capo") -> None:
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError) as error:  # the second is of a port that is no number
            raise InvalidRequestError(
                "the job store's URL cannot be read; write sqlite:////absolute/path/jobs.db or "
                "postgresql+psycopg://user:password@host/database",
                param="database_url",
            ) from error
        self._is_sqlite = parsed.get_backend_name() == "sqlite"
        is_libpq = parsed.drivername.startswith("postgresql+psycopg")
        arguments: dict[str, Any] = {}
        if self._is_sqlite:
            _prepare_sqlite_file(parsed)
            arguments = {"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False}
        elif is_libpq:
            arguments = {name: value for name, value in _libpq_arguments().items() if name not in parsed.query}
        try:
            self._engine = create_engine(parsed, connect_args=arguments, pool_pre_ping=not self._is_sqlite)
        except (NoSuchModuleError, ModuleNotFoundError) as error:
            raise InvalidRequestError(
                f"the job store's database needs a driver that is not installed ({error}); for PostgreSQL "
                "pip install 'capo-llm[postgres]' and write postgresql+psycopg://user:password@host/database",
                param="database_url",
            ) from error
        if self._is_sqlite:
            event.listen(self._engine, "connect", _on_sqlite_connect)
            event.listen(self._engine, "begin", _on_sqlite_begin)
        elif is_libpq and "statement_timeout" not in str(parsed.query.get("options")):
            event.listen(self._engine, "connect", _on_postgresql_connect)
        with self.write() as connection:
            migrations.upgrade(connection, tenant)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads and sees one moment of the store."""
        options = {} if self._is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with _translated(), self._engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; committed at the end, rolled back on any error."""
        with (
            _translated(),
            self._engine.connect().execution_options(**{_WRITE: True}) as connection,
            connection.begin(),
        ):
            yield connection

    def close(self) -> None:
        """Close every idle connection; the next transaction opens a fresh one."""
        self._engine.dispose()


def _prepare_sqlite_file(url: URL) -> None:
    if url.database in (None, "", ":memory:"):
        raise InvalidRequestError(
            "the job store cannot live in memory: the workers are other processes; "
            "give a file, as in sqlite:////absolute/path/jobs.db",
            param="database_url",
        )
    path = Path(str(url.database))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Training data's names and metadata are private; SQLite gives its log files the same mode. A file that is there
        # is never opened beside SQLite: closing it would drop every lock that this process has on it, and the next
        # process to leave would remove the log under the others (https://sqlite.org/howtocorrupt.html, section 2.2).
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise StorageError(f"the job store {path} cannot be opened: {error.strerror}") from error


def _on_sqlite_connect(connection: sqlite3.Connection, _record: object) -> None:
    # None: the driver opens no transactions of its own; _on_sqlite_begin does.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _on_sqlite_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _libpq_arguments() -> dict[str, int]:
    """https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS"""
    return {
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "keepalives_idle": _SILENCE_SECONDS,
        "keepalives_interval": _SILENCE_SECONDS,
        "keepalives_count": 3,
        "tcp_user_timeout": 3 * _SILENCE_SECONDS * 1000,
    }


def _on_postgresql_connect(connection: Any, _record: object) -> None:
    # Not among libpq's `options`: poolers between us and the server refuse those, or leave them out.
    with connection.cursor() as cursor:
        cursor.execute(f"SET statement_timeout = {round(STATEMENT_TIMEOUT_SECONDS * 1000)}")
    connection.commit()


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the driver's errors into Capo's: a bad disk is 507, a busy or absent server 503, a value none takes 400."""
    try:
        yield
    except DBAPIError as error:
        translated = _capo_error(error)
        if translated is None:
            raise
        raise translated from error
    except NoConnectionFreeError as error:
        raise UnavailableError("the job store is busy; try again", retry_after_seconds=1.0) from error


def _capo_error(error: DBAPIError) -> CapoError | None:
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        # The low byte is the primary code: https://sqlite.org/rescode.html
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        if code in _DISK_ERRORS:
            return StorageError(f"the job store cannot be used ({cause}); free space or repair the disk")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return UnavailableError("the job store is busy; try again", retry_after_seconds=1.0)
    elif isinstance(error, OperationalError) or error.connection_invalidated:
        return UnavailableError("the job store does not answer; try again", retry_after_seconds=5.0)
    elif isinstance(error, DataError):  # PostgreSQL knows no NUL in a text, which SQLite simply does not find
        return InvalidRequestError(
            f"the request holds a value that the job store cannot take ({cause}); leave the character NUL out of ids, "
            "cursors and filters",
            code="invalid_value",
        )
    return None
