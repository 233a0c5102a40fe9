"""Threads of the jobs API. A check of a large file takes minutes, a query as long as the database likes."""

from __future__ import annotations

from dataclasses import dataclass, field

from registry.threads import Threads

_STORE_THREADS = 5
"""As many connections as SQLAlchemy keeps open; more calls at once would each open one anew."""
_CHECK_THREADS = 2
"""Each check of a large file is a process that keeps a core busy, and the engine needs the others. Who waits is in line
in the order of arrival."""


@dataclass(frozen=True, slots=True)
class JobThreads:
    """Neither kind waits for the other."""

    store: Threads = field(default_factory=lambda: Threads("job-store", _STORE_THREADS))
    """For what asks the database and is else done at once."""
    checks: Threads = field(default_factory=lambda: Threads("file-checks", _CHECK_THREADS))
    """For what reads large files from one end to the other."""
