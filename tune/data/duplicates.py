"""Rows that say the same, exactly or nearly, in files of any size.

Near duplicates: MinHash (Broder, 1997) over the set of three-word shingles of a row, in 128 hashes, and banding
(Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3) with 16 bands of 8. A pair of Jaccard
similarity 0.8 becomes a candidate with probability 0.95, one of 0.9 with 0.9999; a candidate counts if at least 80 %
of the hashes agree.

Hand-written in numpy because datasketch 2.0, the kept library, holds its index in Python sets: 3.3 KiB a row, and it
brings SciPy. Here a row costs 512 bytes on disk and 20 in memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tune.data.formats import AnyRow
from tune.data.personal import texts_of_row
from tune.data.preferences import PreferenceRow
from tune.data.rows import TextRow

SIMILAR_AT_LEAST = 0.8
_HASHES = 128
_BANDS = 16
_SHINGLE_WORDS = 3
_FEWEST_SHINGLES = 6
"""Of shorter rows near duplicates are not looked for: a changed word changes most of what they say."""
_WORD = re.compile(r"\w+")
_PAIRS_AT_A_TIME = 50_000
_ROWS_AT_A_TIME = 50_000

_random = np.random.default_rng(20_210_406)
_FACTORS = (_random.integers(0, 2**31, _HASHES, dtype=np.uint64) << np.uint64(1)) | np.uint64(1)
_OFFSETS = _random.integers(0, 2**63, _HASHES, dtype=np.uint64)
_WORD_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


class Fingerprints:
    """What each row looks like; rows are known by the order in which they were added. Signatures are kept on disk."""

    def __init__(self) -> None:
        self._exact = array("Q")
        self._has_signature = array("B")
        self._signatures = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()

    def __enter__(self) -> Fingerprints:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._signatures.close()

    def __len__(self) -> int:
        return len(self._exact)

    def add(self, row: AnyRow) -> None:
        self.add_print(exact_print(row), signature(row))

    def add_print(self, exact: int, signed: bytes | None) -> None:
        """As :meth:`add`, for prints that another process made."""
        self._exact.append(exact)
        self._has_signature.append(signed is not None)
        if signed is not None:
            self._signatures.write(signed)

    def exact_duplicates(self) -> dict[int, int]:
        """Each row that repeats an earlier one -> the first of its kind."""
        values = np.frombuffer(self._exact, dtype=np.uint64)
        _, first, group = np.unique(values, return_index=True, return_inverse=True)
        of_row = first[group]
        return {int(row): int(of_row[row]) for row in np.flatnonzero(of_row != np.arange(len(values)))}

    def near_duplicates(self) -> dict[int, int]:
        """Each row that nearly repeats an earlier one -> the earliest found; exact duplicates are left out."""
        if not len(self._exact):
            return {}
        exact = self.exact_duplicates()
        signed = np.flatnonzero(np.frombuffer(self._has_signature, dtype=np.uint8))
        if not len(signed):
            return {}
        self._signatures.flush()
        signatures = _Signatures(self._signatures.fileno())
        unique = np.flatnonzero(~np.isin(signed, np.fromiter(exact, dtype=np.int64, count=len(exact))))
        earliest: dict[int, int] = {}
        for later, earlier in _candidates(signatures, unique):
            for start in range(0, len(later), _PAIRS_AT_A_TIME):
                a, b = later[start : start + _PAIRS_AT_A_TIME], earlier[start : start + _PAIRS_AT_A_TIME]
                same = (signatures.of(a) == signatures.of(b)).mean(axis=1) >= SIMILAR_AT_LEAST
                for row, other in zip(signed[a[same]].tolist(), signed[b[same]].tolist(), strict=True):
                    earliest[row] = min(other, earliest.get(row, other))
        return earliest


class _Signatures:
    """Those in a file, 128 hashes a row. What was read of it is given back at once and stays in the file."""

    def __init__(self, file_number: int) -> None:
        self._mapped = mmap.mmap(file_number, 0, access=mmap.ACCESS_READ)
        self._hashes = np.frombuffer(self._mapped, dtype=np.uint32).reshape(-1, _HASHES)

    def of(self, rows: NDArray[np.int64], columns: slice = slice(None)) -> NDArray[np.uint32]:
        copied: NDArray[np.uint32] = self._hashes[rows, columns]
        self._mapped.madvise(mmap.MADV_DONTNEED)
        return copied


def exact_print(row: AnyRow) -> int:
    """64 bits of the row's content; two different rows in a million share them with probability 3e-8."""
    if isinstance(row, TextRow):
        content: Any = row.text
    elif isinstance(row, PreferenceRow):
        content = [row.chosen.messages, row.chosen.tools, row.rejected.messages]
    else:
        content = [row.messages, row.tools, row.trained]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def signature(row: AnyRow) -> bytes | None:
    """MinHash of the row's words, case and punctuation left out; ``None`` for a row too short to compare."""
    words = [word for text in texts_of_row(row) for word in _WORD.findall(text.lower())]
    if len(words) < _SHINGLE_WORDS + _FEWEST_SHINGLES - 1:
        return None
    hashes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    last = len(hashes) - _SHINGLE_WORDS + 1
    shingles = sum((hashes[i : last + i] * factor for i, factor in enumerate(_WORD_FACTORS)), start=np.uint64(0))
    shingles ^= shingles >> np.uint64(29)
    mixed = np.unique(shingles)[:, None] * _FACTORS + _OFFSETS  # [shingles, 128], modulo 2**64
    lowest: NDArray[np.uint64] = (mixed >> np.uint64(32)).min(axis=0)
    return lowest.astype(np.uint32).tobytes()


def _candidates(
    signatures: _Signatures, unique: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs (later, earlier) that share a band. In a large group each row meets the first one and its neighbour."""
    for band in range(_BANDS):
        _, group = np.unique(_band_prints(signatures, unique, band), return_inverse=True)
        order = np.argsort(group, kind="stable")
        is_same = group[order[1:]] == group[order[:-1]]
        starts = np.flatnonzero(np.concatenate(([True], ~is_same)))
        first_of = order[np.repeat(starts, np.diff(starts, append=len(order)))]
        later = order[1:][is_same]
        yield unique[later], unique[first_of[1:][is_same]]
        yield unique[later], unique[order[:-1][is_same]]


def _band_prints(signatures: _Signatures, rows: NDArray[np.int64], band: int) -> NDArray[np.uint64]:
    """64 bits of each row's band: two that differ and share them become a candidate, which is looked at in full."""
    width = _HASHES // _BANDS
    prints = np.empty(len(rows), dtype=np.uint64)
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        part = signatures.of(rows[start : start + _ROWS_AT_A_TIME], slice(band * width, (band + 1) * width))
        prints[start : start + _ROWS_AT_A_TIME] = (part.astype(np.uint64) * _FACTORS[:width]).sum(axis=1)
    return prints
