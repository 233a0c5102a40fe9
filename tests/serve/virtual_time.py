"""Time that passes only while everybody waits: what takes seconds takes none, and a busy machine delays nothing."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest.mock import patch

Result = TypeVar("Result")


class _Selector(selectors.DefaultSelector):
    """Never waits: lets the time pass instead that the loop would have waited."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for something that will never happen"
            self.now += max(timeout, 0.0)
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.selector = _Selector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def run_in_virtual_time(main: Coroutine[Any, Any, Result]) -> Result:
    """What ``main`` returns, run on a loop of its own. For code without threads or sockets; ``time.monotonic`` is the
    loop's."""
    with asyncio.Runner(loop_factory=_Loop) as runner, patch.object(time, "monotonic", runner.get_loop().time):
        return runner.run(main)
