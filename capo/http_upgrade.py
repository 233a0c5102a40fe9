"""A parser of HTTP/1.1 that reads a request which asks for another protocol like any other.

``Upgrade`` is an offer, which a server may leave alone (RFC 9110, section 7.8); the JDK's client and ``curl --http2``
make it. httptools takes such a request's head for all of it (``cb_on_headers_complete``), and would read its body as
the next request: smuggling, behind a proxy that shares connections.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import httptools


class PlainRequestParser(httptools.HttpRequestParser):
    """``head_of_upgrade`` gives the head that has just been read, as bytes, without its ``Upgrade``.

    Where ``should_upgrade()`` is true in ``protocol``'s callbacks, they are told of the same request once more.
    """

    def __init__(self, protocol: Any, head_of_upgrade: Callable[[], bytes]) -> None:
        self._protocol = protocol
        self._head_of_upgrade = head_of_upgrade
        self._begin()

    def _begin(self) -> None:
        super().__init__(self._protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it

    def feed_data(self, data: bytes | bytearray | memoryview | array[int]) -> None:
        rest = memoryview(data)
        while True:
            try:
                super().feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                head, rest = self._head_of_upgrade(), rest[upgrade.args[0] :]
                self._begin()
                super().feed_data(head)
            else:
                return
