"""What rows come in: JSON Lines, one JSON array, CSV, Parquet, plain text, and folders of them. All are streamed.

Knows no row formats. A row is a JSON object with its line: the line of the file on which it begins, or its number
from 1 where a container has no lines (Parquet, Arrow) or many files (a folder).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias, get_args

from registry.errors import InvalidDataError
from tune.data import arrow, rows
from tune.data.faults import RowFault, row_fault
from tune.data.json_array import split_array
from tune.data.rows import JsonObject

Container: TypeAlias = Literal["jsonl", "json", "csv", "parquet", "arrow", "text", "folder"]
RawRow: TypeAlias = bytes | JsonObject | RowFault
"""The row's JSON text, or the decoded row, or why there is none."""

_BY_SUFFIX: dict[str, Container] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_PARQUET_MAGIC = b"PAR1"
_JSON_COLUMNS = ("messages", "conversations", "tools", "preferred_output", "non_preferred_output")
"""Columns of a CSV file whose cells are JSON; every other cell is text."""


@dataclass(frozen=True, slots=True)
class Source:
    """A data file or folder whose container is known."""

    path: Path
    container: Container

    def rows(self) -> Iterator[tuple[int, RawRow]]:
        """Every row with its line, in the order of the file."""
        return _READERS[self.container](self.path)

    def files(self) -> list[Path]:
        """The files that hold the rows, in reading order: what a digest of the data goes over."""
        return folder_files(self.path) if self.container == "folder" else [self.path]


def open_source(path: Path) -> Source:
    """Find out what ``path`` is: by its suffix, else by its first bytes.

    Raises:
        NotFoundError: there is nothing at ``path``.
        InvalidDataError: a folder that holds no rows, or several splits.
    """
    if path.is_dir():
        folder_files(path)
        return Source(path, "folder")
    known = _BY_SUFFIX.get(path.suffix.lower())
    with rows.open_file(path) as file:
        return Source(path, known or _sniff(file))


def decoded(raw: RawRow, line: int) -> JsonObject:
    """The row as an object.

    Raises:
        RowFault: it is none.
    """
    if isinstance(raw, RowFault):
        raise raw
    return rows.decode_object(raw, line) if isinstance(raw, bytes) else raw


def folder_files(folder: Path) -> list[Path]:
    """Data files of a folder: those that ``datasets.save_to_disk`` lists, or else all with a known suffix, by name."""
    saved = arrow.saved_dataset_files(folder)
    if saved is not None:
        return saved
    suffixes = {*_BY_SUFFIX, ".json"}
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())
    files = [path for path in files if path.name not in arrow.DESCRIPTION_FILES]
    if files:
        return files
    splits = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    hint = f"; it has the folders {splits}: name one of them" if splits else ""
    raise InvalidDataError(f"{folder} holds no data files ({', '.join(sorted(suffixes))}){hint}")


def _sniff(file: BinaryIO) -> Container:
    first = file.read(64)
    file.seek(0)
    if first.startswith(_PARQUET_MAGIC):
        return "parquet"
    return "json" if first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") else "jsonl"


def _jsonl_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    with rows.open_file(path) as file:
        yield from rows.read_lines(file)


def _json_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    with rows.open_file(path) as file:
        if _sniff(file) == "jsonl":  # a .json file that is no array holds a row on each line
            yield from rows.read_lines(file)
        else:
            yield from split_array(file)


def _csv_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    """Excel's dialect (RFC 4180), UTF-8, column names in the first line; a cell may hold newlines."""
    csv.field_size_limit(rows.MAX_LINE_BYTES)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            yield 1, row_fault(1, f"not valid CSV: {error}", "broken_csv")
            return
        if len(set(header)) != len(header) or not all(header):
            yield 1, row_fault(1, f"the first line must name every column once, got {header}", "broken_csv")
            return
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield line, row_fault(line, f"not valid CSV: {error}", "broken_csv")
                continue
            if cells is None:
                return
            yield line, _csv_row(header, cells, line)


def _csv_row(header: list[str], cells: list[str], line: int) -> RawRow:
    if not cells:
        return row_fault(line, "the line is blank; remove it", "blank_line")
    if len(cells) != len(header):
        return row_fault(line, f"the row has {len(cells)} cells, the first line names {len(header)}", "broken_csv")
    row: JsonObject = {}
    for column, cell in zip(header, cells, strict=True):
        try:
            cell.encode("utf-8")
        except UnicodeEncodeError:
            return row_fault(line, f"{column} is not UTF-8", "not_utf8", column)
        if column not in _JSON_COLUMNS:
            row[column] = cell
        elif cell:
            try:
                row[column] = rows.decode_object(b'{"cell": ' + cell.encode() + b"}", line)["cell"]
            except RowFault as fault:
                return row_fault(line, f"{column} does not hold JSON: {fault.message}", "broken_json", column)
    return row


def _text_rows(path: Path) -> Iterator[tuple[int, RawRow]]:
    """A text file is one document."""
    with rows.open_file(path) as file:
        content = file.read(rows.MAX_LINE_BYTES + 1)
    if len(content) > rows.MAX_LINE_BYTES:
        reason = f"longer than {rows.MAX_LINE_BYTES} bytes; a .txt file is one document, so split it"
        yield 1, row_fault(1, reason, "too_long")
        return
    try:
        yield 1, {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield 1, row_fault(1, f"not UTF-8 ({error.reason} at byte {error.start})", "not_utf8")


def _folder_rows(folder: Path) -> Iterator[tuple[int, RawRow]]:
    """Rows of all files, numbered through; a fault names its file and the line there."""
    number = 0
    for path in folder_files(folder):
        for line, raw in open_source(path).rows():
            number += 1
            if isinstance(raw, bytes):
                try:
                    raw = rows.decode_object(raw, line)
                except RowFault as fault:
                    raw = fault
            if isinstance(raw, RowFault):
                raw = row_fault(number, f"{path.name}: {raw.message}", raw.kind, raw.param)
            yield number, raw


_READERS: dict[Container, Callable[[Path], Iterator[tuple[int, RawRow]]]] = {
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "parquet": arrow.parquet_rows,
    "arrow": arrow.arrow_rows,
    "text": _text_rows,
    "folder": _folder_rows,
}
assert set(_READERS) == set(get_args(Container))
