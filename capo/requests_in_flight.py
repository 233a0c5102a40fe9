"""The requests that the door has let in and that have not ended, and a service's end, which waits for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from capo.access_rules import Rule
from serve import readiness


class RequestsInFlight:
    """Of one process, on its event loop. Which requests are refused and waited for, their rules say."""

    def __init__(self) -> None:
        self._count = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def require_open(self, rule: Rule) -> None:
        """Raises:
        UnavailableError: the service drains, and takes no more of these.
        """
        if self._is_draining and rule.is_refused_while_draining:
            readiness.require("draining")

    @contextmanager
    def one(self, rule: Rule) -> Iterator[None]:
        """Count the request for the length of the block, if a drain waits for such."""
        if not rule.is_awaited_by_a_drain:
            yield
            return
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    async def drain(self, deadline_seconds: float) -> int:
        """Refuse new requests and wait for those in flight; returns how many were still running at the deadline."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_seconds):
                await self._idle.wait()
        return self._count
