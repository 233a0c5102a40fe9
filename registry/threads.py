"""Threads for what blocks, apart from asyncio's own.

asyncio has one pool for everything (``cores + 4`` threads), and serving lives on it: first loads of adapters, new
names, trials of constraints, the metrics page. What may wait for long, for a database or for the registry's lock, would
hold all of that up.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Threads:
    """At most ``num_threads``, started when they are first needed; they end when nothing refers to this any more."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, call: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """As :func:`asyncio.to_thread`: the call knows who asks (:mod:`registry.principal`)."""
        known = contextvars.copy_context()
        work = partial(known.run, call, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)
