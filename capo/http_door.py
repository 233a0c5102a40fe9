"""The HTTP side of the door: before a byte of the body is read, every request is matched, and let in or refused.

A request is matched by the application's own routes, so what is asked here is exactly what would be called. What no
route matches goes on to the application's 404 or 405, which tell nothing about anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastapi import FastAPI
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from capo.access import refuse_foreign_pages
from capo.error_answers import answer_error
from registry import errors
from serve.access import Access, Ask


class HttpDoor:
    """``only_this_machine``: the service listens on loopback, and while it needs no keys web pages stay out."""

    def __init__(self, app: ASGIApp, *, routes: FastAPI, access: Access, only_this_machine: bool = False) -> None:
        self._app = app
        self._routes = routes
        self._access = access
        self._only_this_machine = only_this_machine
        self._plain: Mapping[str, str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # nothing here speaks anything else
            return
        operation = self._operation(scope)
        if operation is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["operation"] = operation
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        client = scope.get("client")
        ask = Ask(
            protocol="http",
            operation=operation,
            credential=headers.get(b"authorization"),
            peer=client[0] if client else "-",
            request_id=scope["state"]["request_id"],
            target=scope["path"],
        )

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                ask.result = str(message["status"])
                added = [(name.encode(), value.encode()) for name, value in ask.answer_headers.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        began = False
        state = scope["state"]
        try:
            with self._access.let_in(ask):
                if self._only_this_machine and self._access.is_open:
                    # HTTP/1.0 need not say whom it means; a browser always does.
                    refuse_foreign_pages(headers.get(b"host", "localhost"), headers.get(b"origin"))
                _refuse_compression(headers)
                began = True
                try:
                    await self._app(scope, receive, send_with_limits)
                finally:
                    ask.error_code = state.get("error_code")
        except errors.CapoError as error:
            if began:
                raise
            await answer_error(state, error)(scope, receive, send_with_limits)

    def _operation(self, scope: Scope) -> str | None:
        """What the request would call, as the rules name it; ``None``: nothing."""
        if self._plain is None:
            self._plain = _plain_operations(self._routes.routes)
        asked = f"{scope['method']} {scope['path']}"
        if (plain := self._plain.get(asked)) is not None:
            return plain
        for route in self._routes.routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return f"{scope['method']} {getattr(route, 'path', scope['path'])}"
        return None


def _plain_operations(routes: Sequence[BaseRoute]) -> dict[str, str]:
    """Those whose path has no parameter: found without a search, with the same result."""
    plain: dict[str, str] = {}
    for route in routes:
        path = getattr(route, "path", "")
        for method in getattr(route, "methods", None) or ():
            scope = {"type": "http", "method": method, "path": path, "headers": []}
            first = next((other for other in routes if other.matches(scope)[0] is Match.FULL), None)
            if "{" not in path and first is route:
                plain[f"{method} {path}"] = f"{method} {path}"
    return plain


def _refuse_compression(headers: Mapping[bytes, str]) -> None:
    """A small compressed body may be a huge one; nobody needs it here."""
    if headers.get(b"content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise errors.InvalidRequestError(
            "Compressed request bodies are not taken. Send the body as it is, without Content-Encoding.",
            code="content_encoding",
        )
