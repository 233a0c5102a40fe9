"""Reading a multipart upload straight to the disk, with every limit held while the bytes arrive.

Starlette's own form parser would spool the whole file a second time and has no limit for files. The
multipart grammar itself is python-multipart's (RFC 7578, RFC 2046 section 5.1).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from registry.errors import InvalidRequestError, TooLargeError
from tune.jobs.files import Upload

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # exists for type checkers only

MAX_FIELD_BYTES = 4096
MAX_PARTS = 8
FORM_OVERHEAD_BYTES = 64 * 1024
"""Allowed for boundaries, part headers and the small fields, on top of the file."""
_WRITE_BYTES = 256 * 1024
"""Gathered before they go to the disk; a hundred uploads at once hold a hundred of these."""

_EXTENDED_FILENAME = re.compile(
    rb";[ \t]*filename\*=utf-8'[a-z0-9-]*'((?:%[0-9a-f]{2}|[a-z0-9!#$&+.^_`|~-])+)[ \t]*(?:;|$)", re.IGNORECASE
)
"""RFC 8187, section 3.2. Forms should not have it (RFC 7578, section 4.2), but some clients send a name beyond ASCII in
no other way."""


@dataclass(slots=True)
class Form:
    """The fields of an upload, without the file's bytes."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    """``None`` until the file's part has begun."""


async def receive_form(
    request: Request, upload: Upload, *, fields: Collection[str], max_file_bytes: int, file_field: str = "file"
) -> Form:
    """Stream the part called ``file_field`` into ``upload`` and return the other fields.

    Raises:
        InvalidRequestError: not a well-formed form, or an unknown or repeated field.
        TooLargeError: the body, the file or a field passes its limit.
        ClientDisconnect: the client left before the end.
    """
    limit = max_file_bytes + FORM_OVERHEAD_BYTES
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(max_file_bytes, file_field)
    reader = _FormReader(_boundary(request, file_field), fields, file_field)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise _too_large(max_file_bytes, file_field)
        reader.feed(chunk)
        if received - upload.size_bytes - len(reader.pending) > FORM_OVERHEAD_BYTES:
            raise TooLargeError(
                f"the form has more than {FORM_OVERHEAD_BYTES} bytes beside the file; send the fields and the file "
                "alone",
                code="form_too_large",
            )
        if len(reader.pending) >= _WRITE_BYTES:
            await asyncio.to_thread(upload.write, reader.take())
    await asyncio.to_thread(upload.write, reader.take())
    return reader.finish()


class _FormReader:
    """Callbacks of the multipart parser; file bytes gather in :attr:`pending` until somebody takes them."""

    def __init__(self, boundary: bytes, fields: Collection[str], file_field: str) -> None:
        self.pending = bytearray()
        self._file_field = file_field
        self._form = Form()
        self._fields = fields
        self._parts = 0
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._name = ""
        self._value = bytearray()
        self._ended = False
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:  # the boundary is too long
            raise _malformed(str(error)) from error

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _malformed(str(error)) from error

    def take(self) -> bytes:
        data = bytes(self.pending)
        self.pending.clear()
        return data

    def finish(self) -> Form:
        if not self._ended:
            raise _malformed("the closing boundary is missing, so the upload was cut off")
        if self._form.filename is None:
            raise InvalidRequestError(
                f"the form has no part {self._file_field!r}; send the bytes under that name",
                code="missing_file",
                param=self._file_field,
            )
        return self._form

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _malformed(f"more than {MAX_PARTS} parts")
        self._disposition = b""
        self._value.clear()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if bytes(self._header_name).lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _malformed("a part has no name in its Content-Disposition header")
        self._name = _decoded(options[b"name"])
        if self._name == self._file_field:
            if self._form.filename is not None:
                raise _malformed(f"the part {self._name!r} is given twice; upload one at a time")
            self._form.filename = self._filename(options)
        elif self._name not in self._fields:
            raise InvalidRequestError(
                f"unknown form field {self._name[:80]!r}; allowed: {', '.join((self._file_field, *self._fields))}",
                code="unknown_field",
                param=self._name[:80],
            )
        elif self._name in self._form.fields:
            raise _malformed(f"the field {self._name!r} is given twice")

    def _filename(self, options: Mapping[bytes, bytes]) -> str:
        if (plain := options.get(b"filename")) is not None:
            return _decoded(plain)
        if (extended := _EXTENDED_FILENAME.search(self._disposition)) is not None:
            return _decoded(unquote_to_bytes(extended[1]))
        raise _malformed(f"the part {self._name!r} has no filename, so it is not a file")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self._file_field:
            self.pending += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise TooLargeError(
                f"the form field {self._name!r} is longer than {MAX_FIELD_BYTES} bytes", param=self._name
            )

    def _on_part_end(self) -> None:
        if self._name != self._file_field:
            self._form.fields[self._name] = _decoded(bytes(self._value))

    def _on_end(self) -> None:
        self._ended = True


def _boundary(request: Request, file_field: str) -> bytes:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise InvalidRequestError(
            "compressed request bodies are not taken; send the file as it is", code="content_encoding"
        )
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    if content_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequestError(
            f"bytes are uploaded as multipart/form-data, in a part called {file_field!r}",
            code="not_a_form",
        )
    return options[b"boundary"]


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _malformed("a name or a field is not UTF-8") from error


def _malformed(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"the upload is not a well-formed form: {reason}", code="invalid_form")


def _too_large(max_file_bytes: int, file_field: str) -> TooLargeError:
    return TooLargeError(
        f"the part {file_field!r} is larger than {max_file_bytes} bytes; split it or leave rows out",
        code="file_too_large",
        param=file_field,
    )
