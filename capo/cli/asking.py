"""How commands speak to a running service: over its HTTP API, like any client.

A service with keys is asked with that of the environment variable ``CAPO_API_KEY``; arguments are for all to see.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from registry import errors

DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT_SECONDS = 300.0  # of the longest answer: an upload is checked row by row before it is answered

Url = Annotated[str, typer.Option(help="Address of the service.", envvar="CAPO_URL")]


class Service:
    """Calls the service; its refusals become Capo's errors, with the service's own words."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __call__(self, verb: str, path: str, **options: Any) -> dict[str, Any]:
        import httpx

        try:
            response = self._client.request(verb, f"/v1{path}", **options)
        except httpx.HTTPError as error:
            raise errors.UnavailableError(
                f"no answer from {self._client.base_url}: {error}; start capo serve, or give --url"
            ) from error
        try:
            body: dict[str, Any] = response.json()
        except ValueError:
            body = {}
        if response.is_error:
            fault = body.get("error") or {}
            message = fault.get("message") or f"HTTP {response.status_code} from {response.url}"
            raise errors.InvalidRequestError(message, code=fault.get("code"), line=fault.get("line"))
        return body


def api_key() -> str | None:
    """The key of the environment, without the newline that a file it was read from ends with.

    Raises:
        InvalidRequestError: no header can carry it. Here, because HTTP and gRPC clients quote the whole header.
    """
    key = os.environ.get("CAPO_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise errors.InvalidRequestError(
            "CAPO_API_KEY has characters that no key has; give the key as `capo keys create` printed it, on one line"
        )
    return key or None


@contextmanager
def service(url: str) -> Iterator[Service]:
    import httpx

    base_url = url.rstrip("/").removesuffix("/v1")
    key = api_key()
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=base_url, timeout=_TIMEOUT_SECONDS, headers=headers) as client:
        yield Service(client)
