"""The job store's tables as a chain of changes, run by Alembic (https://alembic.sqlalchemy.org).

A store that is already at :data:`HEAD` is recognised with one query, so that the processes that open one every
second do not import Alembic for it. A new change is a new file in ``versions/`` and a new :data:`HEAD`;
``tests/tune/jobs/test_job_migrations.py`` holds the chain's end to :mod:`tune.jobs.schema`.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, inspect, text

from registry.errors import InvalidRequestError

HEAD = "0010"
_FIRST = "0001"
_VERSION_TABLE = "alembic_version"
_LOCK_NUMBER = 0x6361706F  # "capo"; any constant that no other program of the same database takes


def upgrade(connection: Connection, tenant: str) -> None:
    """Bring the tables to :data:`HEAD` inside the caller's write transaction. Several processes may do so at once.

    ``tenant`` is given the files of a store from before there were tenants.

    Raises:
        InvalidRequestError: a newer Capo wrote the store.
    """
    if _found_version(connection) == HEAD:
        return
    if connection.dialect.name == "postgresql":  # SQLite's writers exclude each other anyway
        # A large table may take minutes, and so does waiting for the process that works on it.
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCK_NUMBER})
    found = _found_version(connection)
    if found == HEAD:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    config.attributes["tenant"] = tenant
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise InvalidRequestError(
            f"the job store has schema version {found[:40]!r}, this Capo knows up to {HEAD!r}; "
            "start the newer Capo that wrote it",
            code="store_too_new",
        )
    if found is None and inspect(connection).has_table("jobs"):
        command.stamp(config, _FIRST)  # written before the store had migrations
    command.upgrade(config, "head")


def _found_version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(_VERSION_TABLE):
        return None
    found = connection.execute(text(f"SELECT version_num FROM {_VERSION_TABLE}")).scalar_one_or_none()  # noqa: S608
    return None if found is None else str(found)
