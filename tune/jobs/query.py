"""What the routes of this room read from a request: bodies, and queries in which nothing is ignored."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from fastapi import Request

from registry.errors import InvalidRequestError, TooLargeError
from tune.jobs.idempotency import Idempotency
from tune.jobs.requests import MAX_BODY_BYTES

LIST_LIMIT = 100
LIST_DEFAULT = 20


async def read_body(request: Request) -> bytes:
    """The whole body of a small JSON request."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise InvalidRequestError("compressed request bodies are not taken", code="content_encoding")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise TooLargeError(f"the body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)


def idempotency_of(request: Request, body: bytes, *, making: str) -> Idempotency | None:
    """The request's ``Idempotency-Key``, if it has one. ``making``: what kind of thing the request makes."""
    key = request.headers.get("idempotency-key")
    return None if key is None else Idempotency.of(key, body, making=making)


def read_query(request: Request, allowed: Collection[str]) -> dict[str, str]:
    """The query as a mapping; a parameter that is unknown or given twice is refused."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in allowed or name in found:
            reason = "given twice" if name in found else f"unknown; allowed: {', '.join(allowed) or 'none'}"
            raise InvalidRequestError(f"query parameter {name[:80]!r} is {reason}", param=name[:80])
        found[name] = value
    return found


def limit_of(query: dict[str, str], *, default: int = LIST_DEFAULT, largest: int = LIST_LIMIT) -> int:
    text = query.get("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= largest):
        raise InvalidRequestError(f"limit must be an integer from 1 to {largest}, got {text[:40]!r}", param="limit")
    return int(text)


def order_of(query: dict[str, str], *, ascending: str = "asc", descending: str = "desc") -> Literal["asc", "desc"]:
    """Newest first unless asked for; the two words are OpenAI's, which differ from list to list."""
    order = query.get("order", descending)
    if order not in (ascending, descending):
        raise InvalidRequestError(f"order must be {ascending!r} or {descending!r}, got {order[:40]!r}", param="order")
    return "asc" if order == ascending else "desc"
