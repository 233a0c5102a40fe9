"""Threads for what blocks, apart from asyncio's own.

asyncio has one pool for everything (``cores + 4`` threads), and serving lives on it: first loads of adapters, new
names, trials of constraints, the metrics page. What may take long here would hold all of that up: minutes for the check
of a large file, and as long as the database likes for a query.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_STORE_THREADS = 5
"""As many connections as SQLAlchemy keeps open; more calls at once would each open one anew."""
_CHECK_THREADS = 2
"""Each check of a large file is a process that keeps a core busy, and the engine needs the others. Who waits is in line
in the order of arrival."""


class Threads:
    """At most ``num_threads``, started when they are first needed; they end when nothing refers to this any more."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, call: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """As :func:`asyncio.to_thread`: the call knows who asks (:mod:`registry.principal`)."""
        known = contextvars.copy_context()
        work = partial(known.run, call, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


@dataclass(frozen=True, slots=True)
class JobThreads:
    """Those of the jobs API. Neither kind waits for the other."""

    store: Threads = field(default_factory=lambda: Threads("job-store", _STORE_THREADS))
    """For what asks the database and is else done at once."""
    checks: Threads = field(default_factory=lambda: Threads("file-checks", _CHECK_THREADS))
    """For what reads large files from one end to the other."""
