"""Where the job store is, said without opening it: settings need this and no SQLAlchemy."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file, for :class:`tune.jobs.database.Database`."""
    return f"sqlite:///{quote(str(path))}"
