"""An end to writes that make no progress, because the client has stopped reading and flow control holds them back."""

from __future__ import annotations

import asyncio
from types import TracebackType

from registry import errors


class StalledWrites:
    """Ends the surrounding task's work when one write takes longer than ``seconds``.

        async with StalledWrites(60) as writes:
            writes.begin()
            await context.write(message)
            writes.end()

    One timer for each call looks at the time now and then: a timeout around every write would be a good part of what a
    token costs.

    Raises:
        UnavailableError: on leaving the block, when a write has stalled.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._began_at: float | None = None
        self._has_stalled = False

    def begin(self) -> None:
        self._began_at = self._loop.time()

    def end(self) -> None:
        self._began_at = None

    async def __aenter__(self) -> StalledWrites:
        task = asyncio.current_task()
        assert task is not None, "a call is handled in a task"
        self._task = task
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        # The client may also have left in the same moment: then the cancellation that is not ours goes on.
        if self._has_stalled and self._task.uncancel() == 0 and isinstance(error, asyncio.CancelledError):
            raise errors.UnavailableError(
                f"The client has read nothing for {self._seconds:g} s. Read the stream to its end, or cancel the call.",
                code="stalled_reader",
            ) from error

    def _look(self) -> None:
        waited = 0.0 if self._began_at is None else self._loop.time() - self._began_at
        if waited >= self._seconds:
            self._has_stalled = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(self._seconds - waited, self._look)
