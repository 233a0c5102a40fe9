"""Ports for processes that must be told theirs before they listen."""

from __future__ import annotations

import secrets
import socket

_LOWEST, _HIGHEST = 20_000, 32_000
"""Below what Linux gives to outgoing connections and to listeners on port 0 (ip_local_port_range begins at 32768): one
of those may take a port again between its choice and its use. Above what Ray gives to its workers, 10002 to 19999."""


def free_port() -> int:
    """Nothing listens there. Chosen by chance from the system's own source, which tests of one seed do not share."""
    while True:
        port = _LOWEST + secrets.randbelow(_HIGHEST - _LOWEST)
        try:
            with socket.create_server(("", port)):
                return port
        except OSError:
            continue
