"""When to try a call again: only what the server says is unavailable, and only before any output."""

from __future__ import annotations

import random
import time

from capo.client.errors import CapoClientError, UnavailableError

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0


class Attempts:
    """The attempts of one call, which share its timeout (seconds; ``None`` for ever)."""

    def __init__(self, retries: int, timeout_seconds: float | None) -> None:
        self._retries_left = retries
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._pause = _FIRST_PAUSE_SECONDS

    @property
    def seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause_after(self, failure: CapoClientError, cause: BaseException) -> float:
        """How many seconds to wait before the next attempt. Doubles, with jitter, and never less than the server asks.

        Raises:
            CapoClientError: ``failure``, when it is final.
        """
        seconds = max(self._pause * random.uniform(0.5, 1.5), failure.retry_after_seconds or 0.0)
        left = self.seconds_left
        if (
            not isinstance(failure, UnavailableError)
            or not self._retries_left
            or (left is not None and left <= seconds)
        ):
            raise failure from cause
        self._retries_left -= 1
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        return seconds
