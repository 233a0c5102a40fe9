"""A line for something of which there is one: tenant by tenant, and nobody waits in it for ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator


class FairLine:
    """One turn at a time, to another tenant than the last where one waits; within a tenant, first come, first served.

    So how long a tenant waits depends on how many others want something, never on how much one of them wants. For one
    event loop.
    """

    def __init__(self) -> None:
        self._is_taken = False
        self._last = ""
        """The tenant that has or had the turn."""
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By tenant, none of them empty; who waits the longest for a turn is first. Those that have left are done."""

    @contextlib.asynccontextmanager
    async def turn(self, tenant: str, *, longest_wait_seconds: float) -> AsyncIterator[None]:
        """Raises:
        TimeoutError: the turn did not come in time.
        """
        if self._is_taken:
            await self._wait(tenant, longest_wait_seconds)
        self._is_taken, self._last = True, tenant
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, tenant: str, longest_wait_seconds: float) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(mine)
        try:
            async with asyncio.timeout(longest_wait_seconds):
                await mine
        except BaseException:
            # A cancelled wait cancels what it waits for, and the turn passes over that.
            if mine.done() and not mine.cancelled():
                self._pass_on()  # it came in the same moment
            raise

    def _pass_on(self) -> None:
        """The turn goes straight to who is next: nobody who comes meanwhile gets in between."""
        while self._waiting:
            tenant = next((tenant for tenant in self._waiting if tenant != self._last), self._last)
            of_tenant = self._waiting.pop(tenant)
            following = of_tenant.popleft()
            if of_tenant:
                self._waiting[tenant] = of_tenant
            if not following.done():
                self._last = tenant
                following.set_result(None)
                return
        self._is_taken = False
