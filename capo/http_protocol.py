"""uvicorn's HTTP protocol with four things that it has not itself.

A bound on what comes before a body: everything until the end of the headers is kept in memory and read by nobody, and a
client that never ends it would cost as much memory as it likes to send. Answers to clients of HTTP/1.0, which know no
chunks. A client that leaves frees its request also when it has sent the next one already. And whoever offers another
protocol is answered in this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from capo.http_upgrade import PlainRequestParser
from registry import errors
from serve import faces


def bounded_heads(
    on_refusal: Callable[[str], None], max_head_bytes: int = faces.MAX_HEAD_BYTES
) -> type[BoundedHeadProtocol]:
    """The protocol for ``uvicorn.Config(http=...)``, which makes one for each connection.

    ``on_refusal`` is told the error's code: what is refused here never becomes a request that others could count.
    """

    class Bounded(BoundedHeadProtocol):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, on_refusal=on_refusal, max_head_bytes=max_head_bytes, **options)

    return Bounded


class BoundedHeadProtocol(HttpToolsProtocol):
    """Answers 431 (RFC 6585, section 5) to a head of more than ``max_head_bytes``."""

    def __init__(self, *arguments: Any, on_refusal: Callable[[str], None], max_head_bytes: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parser = PlainRequestParser(self, self._head_without_upgrade)
        self._on_refusal = on_refusal
        self._max_head_bytes = max_head_bytes
        self._is_in_head = True
        self._received_bytes = 0
        """Of this head, as far as it came in pieces of its own."""
        self._parsed_bytes = 0
        self._running: RequestResponseCycle | None = None
        self._ahead_bytes = 0
        """Read behind a request that waits for the running one's answer."""

    def data_received(self, data: bytes) -> None:
        if self.pipeline and self._running is not None:
            self._ahead_bytes += len(data)
            if self._ahead_bytes > HIGH_WATER_LIMIT:
                # Not kept, so its answer is the last one here; a client sends again what was not answered
                # (RFC 9112, section 9.3.2).
                self._running.keep_alive = False
                return
        super().data_received(data)
        if self.pipeline:
            # uvicorn stops reading until the answer is out, and would not notice that the client has left.
            self.flow.resume_reading()
        # The parser holds back a name or value until its end, so what it has told of is not all there is.
        if self._is_in_head:
            self._received_bytes += len(data)
            if self._received_bytes > self._max_head_bytes and not self.transport.is_closing():
                self._refuse_head()

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._received_bytes = self._parsed_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":  # which is no offer: there is nothing to answer instead
                raise errors.InvalidRequestError("this is no proxy")  # ends the parsing; send_400_response answers
            return
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _head_without_upgrade(self) -> bytes:
        request_line = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
        return b"\r\n".join([request_line, *fields, b"", b""])

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running, self._ahead_bytes = cycle, 0
        is_old = cycle.scope["http_version"] == "1.0"
        super()._start_asgi_task(cycle, _delimited_by_its_end(app, cycle) if is_old else app)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # uvicorn tells the request that came last, which need not be the one that runs.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def _count(self, num_bytes: int) -> None:
        self._parsed_bytes += num_bytes
        if self._is_in_head and self._parsed_bytes > self._max_head_bytes:
            raise errors.TooLargeError("the head is too large")  # ends the parsing; send_400_response answers

    def send_400_response(self, msg: str) -> None:
        if self._parsed_bytes > self._max_head_bytes:
            self._refuse_head()
        else:
            self._answer_and_close(HTTPStatus.BAD_REQUEST, "The request is not valid HTTP/1.1.", "invalid_http")

    def _refuse_head(self) -> None:
        message = f"The request's line and headers are larger than {self._max_head_bytes} bytes. Send less."
        self._answer_and_close(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message, "headers_too_large")

    def _answer_and_close(self, status: HTTPStatus, message: str, code: str) -> None:
        self._on_refusal(code)
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def _delimited_by_its_end(app: Any, cycle: RequestResponseCycle) -> Any:
    """The ASGI application ``app``, whose answers of unknown length end with the connection instead of coming in
    chunks, which must not be sent to a client of HTTP/1.0 (RFC 9112, section 6.1). ``cycle`` writes the answer; it
    closes such connections."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        is_of_unknown_length = False

        async def send_bare(message: Message) -> None:
            nonlocal is_of_unknown_length
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message.get("headers", ())}
                if is_of_unknown_length := b"content-length" not in names:
                    cycle.chunked_encoding = False
            elif is_of_unknown_length:
                cycle.expected_content_length = len(message.get("body", b""))  # each piece is what was announced
            await send(message)

        await app(scope, receive, send_bare)

    return answer
