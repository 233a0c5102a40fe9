"""How commands speak to a running service: over its HTTP API, like any client.

A service with keys is asked with that of the environment variable ``CAPO_API_KEY``; arguments are for all to see.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

import typer

from registry import errors

KEY_HELP = "A service with keys is asked with that of CAPO_API_KEY."
DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT_SECONDS = 300.0  # of the longest answer: an upload is checked row by row before it is answered

Url = Annotated[str, typer.Option(help="Address of the service.", envvar="CAPO_URL")]


class Answer(dict[str, Any]):
    """A JSON object of an answer. Where it lacks what a command reads, something else answers at the address."""

    def __init__(self, address: str, members: dict[str, Any]) -> None:
        super().__init__(members)
        self._address = address

    def __missing__(self, name: str) -> Any:
        raise _no_capo(self._address, f"its answer has no {name!r}")

    def records(self) -> list[Answer]:
        """Of a list."""
        records = self["data"]
        if not isinstance(records, list) or not all(isinstance(record, Answer) for record in records):
            raise _no_capo(self._address, "its 'data' is no list of objects")
        return records


class Service:
    """Calls the service; its refusals become Capo's errors, with the service's own words.

    Raises:
        InvalidRequestError: it refused, and did nothing.
        UnavailableError: no answer, or one that something failed there.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def __call__(self, verb: str, path: str, **options: Any) -> Answer:
        import httpx

        try:
            response = self._client.request(verb, f"/v1{path}", **options)
        except httpx.HTTPError as error:
            raise errors.UnavailableError(
                f"no answer from {self._client.base_url}: {error}; start capo serve, or give --url"
            ) from error
        except httpx.InvalidURL as error:
            raise errors.InvalidRequestError(f"{path!r} can be no address: {error}") from error
        address = str(response.url)
        try:
            body = response.json(object_hook=partial(Answer, address))
        except (ValueError, RecursionError):
            body = None
        if response.is_error:
            kind = errors.UnavailableError if response.is_server_error else errors.InvalidRequestError
            fault = body.get("error") if isinstance(body, Answer) else None
            if not isinstance(fault, Answer):
                raise kind(f"HTTP {response.status_code} from {address}")
            where = f" {KEY_HELP}" if response.status_code == HTTPStatus.UNAUTHORIZED else ""
            raise kind(f"{fault['message']}{where}", code=fault.get("code"), line=fault.get("line"))
        if not isinstance(body, Answer):
            raise _no_capo(address, f"its answer, HTTP {response.status_code}, is no JSON object")
        return body


def _no_capo(address: str, reason: str) -> errors.UnavailableError:
    return errors.UnavailableError(f"{address} is no Capo: {reason}; give the address of one with --url")


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
    try:
        client = httpx.Client(base_url=base_url, timeout=_TIMEOUT_SECONDS, headers=headers)
    except httpx.InvalidURL as error:
        raise errors.InvalidRequestError(
            f"--url {url!r} is no address ({error}); write it like {DEFAULT_URL}", param="url"
        ) from error
    with client:
        yield Service(client)
