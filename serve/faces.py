"""What both faces, HTTP and gRPC, agree on: request ids, sizes, patience with slow readers, clients that leave."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

MAX_REQUEST_BYTES = 8 * 1024 * 1024
"""The largest JSON body and gRPC message; several times the text of the longest context."""

MAX_HEAD_BYTES = 16 * 1024
"""The largest request line and headers of HTTP, and metadata of gRPC: room for long trace states and cookies."""

STALLED_READER_SECONDS = 60.0
"""A client that takes nothing for this long is given up: it would hold its adapter in the engine for ever."""

TRACE_HEADERS = ("traceparent", "tracestate")
"""W3C trace context, passed on to the engine."""

current_request_id: ContextVar[str] = ContextVar("capo_request_id")
"""Of the request that is being answered, for log lines; set in the task that handles it, for the task's length."""


class ClientGoneError(Exception):
    """The client closed its connection before the answer; nobody is left to answer."""


_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def request_id(given: str) -> str:
    """The client's own id where it is a plain token, which cannot break a log line or a header; else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
