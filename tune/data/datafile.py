"""A data file as checked rows: its container and row format are found out once, and said.

file = open_data(Path("rows.parquet"), purpose="sft")
print(file.sentence())
for line, row in file.rows(): ...
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

from registry.errors import InvalidDataError, InvalidRequestError
from tune.data.containers import RawRow, Source, decoded, open_source
from tune.data.faults import RowFault
from tune.data.formats import FORMATS, AnyRow, Format, detect_format, parse_object
from tune.data.rows import JsonObject, no_rows
from tune.digest import file_sha256

Purpose: TypeAlias = Literal["sft", "cpt", "mixed", "dpo"]
"""What the rows are for: chats, running text, files of either, or preferences."""

_FORMATS_FOR: dict[Purpose, tuple[Format, ...]] = {
    "sft": ("chat", "prompt-completion", "alpaca", "sharegpt"),
    "cpt": ("text",),
    "mixed": ("chat", "prompt-completion", "alpaca", "sharegpt", "text"),
    "dpo": ("preference",),
}
_LOOKED_AT = 100
"""Rows that are looked at for a format; where all of them have unknown keys, the purpose's first format is taken."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file or folder that is ready to be read, any number of times."""

    source: Source
    format: Format
    why: str
    """How the format was found."""
    ignored_keys: tuple[str, ...] = ()
    """Top-level keys that are left out before a row is looked at."""

    def rows(self) -> Iterator[tuple[int, AnyRow | RowFault]]:
        """Every row, checked, or its fault; streamed. A file without rows gives one fault."""
        line = 0
        for line, raw in self.source.rows():
            yield line, self.checked(raw, line)
        if line == 0:
            yield 1, no_rows()

    def checked(self, raw: RawRow, line: int) -> AnyRow | RowFault:
        """One row of :attr:`source`, checked."""
        try:
            return parse_object(_without(decoded(raw, line), self.ignored_keys), line, self.format)
        except RowFault as fault:
            return fault

    def sha256(self) -> str:
        """Of the bytes; for a folder, of its files' names and digests."""
        if self.source.container != "folder":
            return file_sha256(self.source.path)
        sha = hashlib.sha256()
        for path in self.source.files():
            sha.update(f"{path.name}\0{file_sha256(path)}\n".encode())
        return sha.hexdigest()

    def sentence(self) -> str:
        return f"{self.source.container} of {self.format} rows ({self.why})"


def open_data(
    path: Path,
    *,
    purpose: Purpose | None = None,
    named: Format | None = None,
    ignored_keys: tuple[str, ...] = (),
) -> DataFile:
    """Find out what a file holds.

    Args:
        purpose: ``None`` takes any format. Rows of a format that the purpose cannot use are then faults.
        named: the format, where somebody knows it.

    Raises:
        NotFoundError: there is no such file.
        InvalidRequestError: the named format does not serve the purpose.
    """
    allowed = FORMATS if purpose is None else _FORMATS_FOR[purpose]
    if named is not None and named not in allowed:
        raise InvalidRequestError(
            f"format={named!r} holds no rows for {purpose}; it reads {', '.join(allowed)}", param="format"
        )
    source = open_source(path)
    if named is not None:
        return DataFile(source, named, "as named", ignored_keys)
    for line, row in _first_objects(source, ignored_keys):
        found = detect_format(row)
        if found in allowed:
            return DataFile(source, found, f"by the keys of line {line}", ignored_keys)
        if found is not None and purpose is not None:
            _refuse_other_purpose(found, purpose, line)
            break
    return DataFile(source, allowed[0], "no row says otherwise", ignored_keys)


def _refuse_other_purpose(found: Format, purpose: Purpose, line: int) -> None:
    """Where the default format's own words would not tell what is wrong."""
    if found in ("chat", "text", "prompt-completion"):
        return
    wanted = ", ".join(_FORMATS_FOR[purpose])
    reason = f"line {line}: this is a {found} row, and {purpose} reads {wanted}"
    if found != "preference" or purpose != "sft":
        raise InvalidDataError(reason, line=line)
    raise InvalidDataError(f"{reason}; preferences are what DPO trains on", line=line)


def _first_objects(source: Source, ignored_keys: tuple[str, ...]) -> Iterator[tuple[int, JsonObject]]:
    for line, raw in islice(source.rows(), _LOOKED_AT):
        try:
            yield line, _without(decoded(raw, line), ignored_keys)
        except RowFault:
            continue


def _without(row: JsonObject, keys: tuple[str, ...]) -> JsonObject:
    return {key: value for key, value in row.items() if key not in keys} if keys else row
