"""Tokenised rows on disk, so that memory does not grow with the data: what stays in it is an index.

A store is a directory::

    tokens.bin   for each example its token ids (int32, little endian), then its mask (one byte a token)
    ends.bin     int64: where each example ends in tokens.bin, in tokens
    lines.bin    int64: the line of each example's row
    rows.bin     int64: how many examples there are up to the end of each row
    digests.bin  32 bytes for each row, see ``EncodedRow.digest``
    done.json    written last: what the store is complete with

The index (the three int64 files) is held in memory: 24 bytes for a row of one example. Tokens are read when they are
needed, with ``pread`` and not through a memory map: pages of a map would count as ours, and a file cut short would
end the process instead of raising an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from registry.errors import StorageError
from tune.data.mask import Example

DIGEST_BYTES = 32
_BYTES_PER_TOKEN = 5
_INDEX = ("ends", "lines", "rows")
_DONE = "done.json"


class TokenisedRow(Protocol):
    """A row after tokenisation, in memory or on disk."""

    @property
    def examples(self) -> tuple[Example, ...]:
        """They stay together when rows are held out."""

    @property
    def digest(self) -> bytes:
        """Equal for rows with equal tokens."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """All examples of one row, in memory."""

    examples: tuple[Example, ...]

    @property
    def digest(self) -> bytes:
        """Equal for rows with equal tokens."""
        sha = hashlib.sha256()
        for example in self.examples:
            sha.update(example.token_ids.tobytes() + b"|" + example.trained.tobytes() + b"||")
        return sha.digest()


@dataclass(frozen=True, slots=True)
class StoredRow:
    """A row by its number; its tokens are read when they are asked for."""

    store: TokenStore
    number: int

    @property
    def examples(self) -> tuple[Example, ...]:
        return tuple(self.store.example(index) for index in self.store.examples_of(self.number))

    @property
    def digest(self) -> bytes:
        return self.store.digest(self.number)


class StoreWriter:
    """Appends rows to a new store. ``finish`` makes it readable; without it the directory is no store."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._index = {name: array("q") for name in _INDEX}
        self._num_tokens = 0
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _DONE).unlink(missing_ok=True)
        self._tokens: BinaryIO = (directory / "tokens.bin").open("wb")
        self._digests: BinaryIO = (directory / "digests.bin").open("wb")

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._tokens.close()
        self._digests.close()

    def append(self, row: EncodedRow) -> None:
        try:
            for example in row.examples:
                self._tokens.write(example.token_ids.astype("<i4", copy=False).tobytes())
                self._tokens.write(example.trained.tobytes())
                self._num_tokens += len(example.token_ids)
                self._index["ends"].append(self._num_tokens)
                self._index["lines"].append(example.line)
            self._index["rows"].append(len(self._index["ends"]))
            self._digests.write(row.digest)
        except OSError as error:
            raise _cannot_write(self._directory, error) from error

    def finish(self, account: dict[str, Any]) -> TokenStore:
        """Close the files and open the store; ``account`` is kept with it."""
        try:
            self._tokens.close()
            self._digests.close()
            for name, values in self._index.items():
                with (self._directory / f"{name}.bin").open("wb") as file:
                    values.tofile(file)
            sizes = {path.name: path.stat().st_size for path in self._directory.glob("*.bin")}
            done = {"sizes": sizes, "account": account}
            (self._directory / f"{_DONE}.new").write_text(json.dumps(done), "utf-8")
            (self._directory / f"{_DONE}.new").rename(self._directory / _DONE)
        except OSError as error:
            raise _cannot_write(self._directory, error) from error
        return TokenStore(self._directory)


class TokenStore:
    """Examples and rows by number. Safe to read from threads and after a fork; its files may be unlinked meanwhile."""

    def __init__(self, directory: Path) -> None:
        self._ends, self._lines, self._rows = (
            np.fromfile(directory / f"{name}.bin", dtype=np.int64) for name in _INDEX
        )
        self._tokens = os.open(directory / "tokens.bin", os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._tokens)
        self._digests = os.open(directory / "digests.bin", os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._digests)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self._ends, prepend=0)

    def example(self, number: int) -> Example:
        end = int(self._ends[number])
        start = int(self._ends[number - 1]) if number else 0
        length = end - start
        raw = self._read(self._tokens, length * _BYTES_PER_TOKEN, start * _BYTES_PER_TOKEN)
        ids = np.frombuffer(raw, dtype="<i4", count=length).astype(np.int32, copy=False)
        trained = np.frombuffer(raw, dtype=np.bool_, offset=4 * length)
        return Example(ids, trained, int(self._lines[number]))

    def examples_of(self, row: int) -> range:
        """Numbers of the row's examples."""
        return range(int(self._rows[row - 1]) if row else 0, int(self._rows[row]))

    def examples_per_row(self) -> NDArray[np.int64]:
        return np.diff(self._rows, prepend=0)

    def digest(self, row: int) -> bytes:
        return self._read(self._digests, DIGEST_BYTES, row * DIGEST_BYTES)

    @staticmethod
    def _read(descriptor: int, length: int, offset: int) -> bytes:
        raw = os.pread(descriptor, length, offset)
        if len(raw) != length:
            raise StorageError(f"a store of tokenised rows was cut short: {len(raw)} of {length} bytes at {offset}")
        return raw


class StoredRows(Sequence[StoredRow]):
    """All rows of a store."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return self.store.num_rows

    @overload
    def __getitem__(self, number: int) -> StoredRow: ...
    @overload
    def __getitem__(self, number: slice) -> list[StoredRow]: ...
    def __getitem__(self, number: int | slice) -> StoredRow | list[StoredRow]:
        if isinstance(number, slice):
            return [StoredRow(self.store, i) for i in range(*number.indices(len(self)))]
        return StoredRow(self.store, range(len(self))[number])

    def __iter__(self) -> Iterator[StoredRow]:
        return (StoredRow(self.store, number) for number in range(len(self)))


def open_store(directory: Path) -> tuple[TokenStore, dict[str, Any]] | None:
    """A finished store and what it was finished with; ``None`` where there is none, or not all of it."""
    try:
        done = json.loads((directory / _DONE).read_text("utf-8"))
        if any((directory / name).stat().st_size != size for name, size in done["sizes"].items()):
            return None
        return TokenStore(directory), done["account"]
    except FileNotFoundError:
        return None


def _cannot_write(directory: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write tokenised rows to {directory}: {error}; free some space and try again")
