"""A PostgreSQL server of this machine's own binaries, for one test session, on a Unix socket."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine

from tests.programs import program
from tests.tune.jobs.support import wait_until


@contextmanager
def running_postgres() -> Iterator[str]:
    """Yields the address without a database: a name, and nothing else, is to be put after it."""
    initdb, postgres = program("initdb"), program("postgres")
    # PostgreSQL refuses to run as root, and a socket's path must be short.
    owner: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    home = Path(tempfile.mkdtemp(prefix="capo-pg-"))
    if owner:
        shutil.chown(home, **owner)
    data = home / "data"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": home, **owner}
    server = None
    try:
        command = [initdb, "-D", str(data), "-U", "capo", "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(command, check=True, **quiet)
        command = [postgres, "-D", str(data), "-k", str(home), "-c", "listen_addresses=", "-c", "fsync=off"]
        server = subprocess.Popen(command, **quiet)
        wait_until(lambda: _is_ready(data / "postmaster.pid"), seconds=30)
        yield f"postgresql+psycopg://capo@/{{name}}?host={home}"
    finally:
        if server is not None:
            server.send_signal(signal.SIGQUIT)  # at once: what it would still write is about to be removed
            server.wait(20)
        shutil.rmtree(home)


def _is_ready(pid_file: Path) -> bool:
    """The socket is there before the server takes connections; the last line of this file says when it does."""
    try:
        return pid_file.read_text().split()[-1:] == ["ready"]
    except FileNotFoundError:
        return False


def new_database(address: str, name: str) -> str:
    """Makes an empty database; its URL."""
    engine = create_engine(address.format(name="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
    engine.dispose()
    return address.format(name=name)
