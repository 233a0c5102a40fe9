"""One large JSON array, cut into its elements without reading it whole.

Only brackets, quotes and commas are looked at here; whether an element is valid is for the row's own decoder to
say. So a broken element is a fault of its own and the rows after it are still read, as long as its brackets match.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from tune.data import rows
from tune.data.faults import RowFault, row_fault

_CHUNK_BYTES = 1 << 20
_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE_STRING = re.compile(rb'["\\]')
_SPACE = b" \t\r\n"


def split_array(file: BinaryIO) -> Iterator[tuple[int, bytes | RowFault]]:
    """Elements of the array as bytes, each with the line on which it begins."""
    scanner = _Scanner(file)
    for end, is_last in scanner.elements():
        raw = bytes(scanner.buffer[:end])
        leading = len(raw) - len(raw.lstrip(_SPACE))
        line = scanner.line + raw.count(b"\n", 0, leading)
        scanner.line += raw.count(b"\n")
        if len(raw) > rows.MAX_LINE_BYTES:
            yield line, row_fault(line, f"longer than {rows.MAX_LINE_BYTES} bytes", "too_long")
        elif raw.strip(_SPACE):
            yield line, raw.strip(_SPACE)
        elif not (is_last and scanner.is_first):
            yield line, row_fault(line, "not valid JSON: nothing stands between two commas", "broken_json")
    if scanner.problem is not None:
        yield scanner.line, row_fault(scanner.line, scanner.problem, "broken_json")


class _Scanner:
    """Walks the bytes of the array; ``buffer`` holds no more than the element under way and one chunk."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.buffer = bytearray()
        self.line = 1
        """Where the next element's bytes begin."""
        self.is_first = True
        self.problem: str | None = None
        self._position = 0

    def elements(self) -> Iterator[tuple[int, bool]]:
        """Yield for each element where it ends in ``buffer`` (it starts at 0) and whether it is the last; valid until
        the next one is asked for.
        """
        while not self.buffer.lstrip(b"\xef\xbb\xbf" + _SPACE):
            if not self._read():
                return
        opening = self.buffer.index(b"[")
        self.line += self.buffer.count(b"\n", 0, opening)
        del self.buffer[: opening + 1]
        depth = 0
        in_string = False
        while True:
            found = (_INSIDE_STRING if in_string else _OUTSIDE).search(self.buffer, self._position)
            if found is None or (found.group() == b"\\" and found.end() == len(self.buffer)):
                self._position = len(self.buffer) if found is None else found.start()
                if len(self.buffer) > rows.MAX_LINE_BYTES:
                    self.problem = f"an element is longer than {rows.MAX_LINE_BYTES} bytes; the rest was not read"
                    return
                if not self._read():
                    self.problem = "the array does not end; the file was cut off"
                    return
                continue
            sign, self._position = found.group(), found.end()
            if sign == b"\\":
                self._position += 1
            elif sign == b'"':
                in_string = not in_string
            elif sign in b"{[":
                depth += 1
            elif sign in b"}]" and depth:
                depth -= 1
            elif sign == b"," and depth:
                continue
            elif sign == b"}":
                self.problem = "not valid JSON: a '}' too many; the rest was not read"
                return
            else:
                yield found.start(), sign == b"]"
                del self.buffer[: found.end()]
                self._position = 0
                self.is_first = False
                if sign == b"]":
                    self._check_tail()
                    return

    def _check_tail(self) -> None:
        rest = bytes(self.buffer) + self._file.read(_CHUNK_BYTES)
        if rest.strip(_SPACE):
            self.problem = "not valid JSON: something follows the array"

    def _read(self) -> bool:
        chunk = self._file.read(_CHUNK_BYTES)
        self.buffer += chunk
        return bool(chunk)
