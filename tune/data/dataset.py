"""A stage's files as examples, with every row accounted for: used, truncated or dropped, by line and reason.

Knows rows and masks; knows nothing of batches, models or the registry. Tokenised rows go to a store on disk
(``tune.data.store``); where the caller keeps the directory, the same file is not tokenised twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from registry.durable import Filesystem, storage_errors
from registry.errors import InvalidDataError, InvalidRequestError
from tune.data.clean import redacted_row, with_system_prompt
from tune.data.datafile import DataFile, Purpose, open_data
from tune.data.encode import RowEncoder
from tune.data.faults import RowFault
from tune.data.formats import Format
from tune.data.mask import Example, Tokenizer
from tune.data.rows import ChatRow
from tune.data.store import EncodedRow, StoredRows, StoreWriter, TokenisedRow, open_store

_SHOWN_LINES = 10
_STORE_VERSION = 2
"""Counts up whenever the same row comes to give other tokens or another mask."""
OVER_LENGTH = "over_length"
"""Reason of a dropped row: longer than max_length, or with no trained token within it."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How one source is read, beyond where it lies."""

    format: Format | None = None
    system_prompt: str | None = None
    """Put before chats that have no system message of their own."""
    ignored_keys: tuple[str, ...] = ()
    personal_data: Literal["keep", "redact", "drop"] = "keep"


@dataclass(slots=True)
class RowAccount:
    """Where a file's rows went. ``rows_truncated`` are among ``rows_used``."""

    path: Path
    """As written in the recipe."""
    sha256: str
    format: str = ""
    """Container and row format, and how they were found."""
    rows_used: int = 0
    rows_truncated: int = 0
    rows_dropped: int = 0
    rows_redacted: int = 0
    """Rows used in which personal data was replaced."""
    rows_held_out: int = 0
    """Rows used for validation instead of training."""
    split_rows: int = 0
    """Rows that became several examples, because one could not hold all trained turns as serving sees them."""
    dropped: dict[str, int] = field(default_factory=dict)
    """How many rows were dropped, by reason."""
    lines_truncated: list[int] = field(default_factory=list)
    """The first ten."""
    lines_dropped: list[int] = field(default_factory=list)
    """The first ten; all of them, with their reasons, stand in ``rows.jsonl`` beside the store."""

    @property
    def lost_something(self) -> bool:
        return self.rows_truncated + self.rows_dropped > 0

    def sentence(self) -> str:
        text = f"{self.path}: {self.rows_used} rows used"
        if self.rows_truncated:
            text += (
                f", {self.rows_truncated} of them truncated (lines {_shown(self.lines_truncated, self.rows_truncated)})"
            )
        if self.rows_redacted:
            text += f", {self.rows_redacted} of them with personal data redacted"
        if self.rows_dropped:
            text += f", {self.rows_dropped} dropped (lines {_shown(self.lines_dropped, self.rows_dropped)})"
        if set(self.dropped) - {OVER_LENGTH}:
            text += f": {', '.join(f'{count} {reason}' for reason, count in sorted(self.dropped.items()))}"
        if self.rows_held_out:
            text += f", {self.rows_held_out} of them held out for validation"
        if self.split_rows:
            text += f", {self.split_rows} split into one example for each trained turn"
        return text


class DatasetReader:
    """Reads files of one stage kind. Holds the tokenizer; keeps no rows.

    Args:
        store_dir: where stores are kept and found again; ``None`` for stores that live as long as their rows do.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        kind: Purpose,
        max_length: int,
        over_length: Literal["truncate", "drop", "refuse"],
        store_dir: Path | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._kind = kind
        self._encoder = RowEncoder(tokenizer)
        self._max_length = max_length
        self._over_length = over_length
        self._store_dir = store_dir

    def open(self, path: Path, options: ReadOptions | None = None) -> DataFile:
        """The file as the stage's kind reads it."""
        options = options or ReadOptions()
        return open_data(path, purpose=self._kind, named=options.format, ignored_keys=options.ignored_keys)

    def read(
        self,
        path: Path,
        *,
        shown_as: Path,
        options: ReadOptions | None = None,
        duplicates: Mapping[int, str] | None = None,
    ) -> tuple[StoredRows, RowAccount]:
        """Encode a whole file, or find it encoded.

        Args:
            duplicates: rows to drop, by their place from 0, each with the reason.

        Raises:
            InvalidDataError: at the first faulty row; and when no row is left to train on.
            InvalidRequestError: the options do not fit what the file holds.
            NotFoundError: there is no such file.
            StorageError: the disk refused.
        """
        options, duplicates = options or ReadOptions(), duplicates or {}
        file = self.open(path, options)
        if options.system_prompt is not None and file.format == "text":
            raise InvalidRequestError(
                f"system_prompt stands before chats, and {shown_as} holds texts; remove it", param="system_prompt"
            )
        account = RowAccount(path=shown_as, sha256=file.sha256(), format=file.sentence())
        if self._store_dir is not None:
            directory = self._store_dir / self._store_name(account.sha256, file, options, duplicates)
            with _writing_alone(directory):
                kept = open_store(directory)
                if kept is not None:
                    store, numbers = kept
                    return StoredRows(store), RowAccount(**{**numbers, "path": shown_as})
                return self._encode_file(file, account, directory, options, duplicates), account
        with tempfile.TemporaryDirectory(prefix="capo-rows-") as temporary:
            return self._encode_file(file, account, Path(temporary), options, duplicates), account

    def _store_name(self, sha256: str, file: DataFile, options: ReadOptions, duplicates: Mapping[int, str]) -> str:
        """Of everything that decides the tokens."""
        tokenizer = self._tokenizer
        decides = [
            _STORE_VERSION,
            [version("transformers"), version("tokenizers"), tokenizer.backend_tokenizer.to_str()],
            [tokenizer.chat_template, str(tokenizer.special_tokens_map)],
            [self._kind, self._max_length, self._over_length, sha256, file.format, asdict(options)],
            sorted(duplicates.items()),
        ]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]

    def _encode_file(
        self,
        file: DataFile,
        account: RowAccount,
        directory: Path,
        options: ReadOptions,
        duplicates: Mapping[int, str],
    ) -> StoredRows:
        with (
            storage_errors("keep tokenised rows"),
            StoreWriter(directory) as writer,
            (directory / "rows.jsonl").open("w", encoding="utf-8") as outcomes,
        ):

            def drop(line: int, reason: str) -> None:
                account.rows_dropped += 1
                account.dropped[reason] = account.dropped.get(reason, 0) + 1
                _remember(account.lines_dropped, line)
                outcomes.write(json.dumps({"line": line, "outcome": "dropped", "reason": reason}) + "\n")

            for place, (line, row) in enumerate(file.rows()):
                if isinstance(row, RowFault):
                    raise row
                if place in duplicates:
                    drop(line, duplicates[place])
                    continue
                cleaned = redacted_row(row) if options.personal_data != "keep" else row
                if cleaned != row and options.personal_data == "drop":
                    drop(line, "personal_data")
                    continue
                truncated_before = account.rows_truncated
                prompted = with_system_prompt(cleaned, options.system_prompt)
                examples = self._encoder.encode(prompted, window_tokens=self._max_length)
                kept = self._fitted(examples, line, account)
                if not kept:
                    drop(line, OVER_LENGTH)
                    continue
                writer.append(EncodedRow(kept))
                account.split_rows += isinstance(row, ChatRow) and len(kept) > 1
                account.rows_used += 1
                account.rows_redacted += cleaned != row
                if account.rows_truncated > truncated_before:
                    outcomes.write(json.dumps({"line": line, "outcome": "truncated"}) + "\n")
            if account.rows_used == 0:
                raise self._nothing_left(account)
            return StoredRows(writer.finish({**asdict(account), "path": account.path.as_posix()}))

    def _nothing_left(self, account: RowAccount) -> InvalidDataError:
        if set(account.dropped) - {OVER_LENGTH}:
            return InvalidDataError(
                f"no row is left to train on; {account.sentence()}; change what clean asks for", code="nothing_to_train"
            )
        reason = f"none of the {account.rows_dropped} rows of {account.path} has a trained token"
        return InvalidDataError(
            f"{reason} within {self._max_length} tokens; raise max_length or shorten the rows", code="nothing_to_train"
        )

    def _fitted(self, examples: list[Example], line: int, account: RowAccount) -> tuple[Example, ...]:
        """The row's examples within ``max_length``, without those that would train nothing."""
        longest = max((len(example.token_ids) for example in examples), default=0)
        if longest > self._max_length:
            if self._over_length == "refuse":
                reason = f"the row has {longest} tokens, max_length is {self._max_length}"
                raise InvalidDataError(
                    f"line {line}: {reason}; raise max_length, shorten the row, or set over_length to truncate or drop",
                    line=line,
                )
            if self._over_length == "drop":
                return ()
            examples = [
                Example(e.token_ids[: self._max_length], e.trained[: self._max_length], e.line) for e in examples
            ]
        kept = tuple(example for example in examples if example.num_trained)
        if self._kind == "dpo" and len(kept) < len(examples):
            return ()  # half a pair prefers nothing
        if kept and longest > self._max_length:
            account.rows_truncated += 1
            _remember(account.lines_truncated, line)
        return kept


@contextmanager
def _writing_alone(directory: Path) -> Iterator[None]:
    """Of several processes of one run the first encodes, and the others wait and find what it wrote."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = Filesystem().lock(directory / "lock", wait_seconds=math.inf)
    assert lock is not None, directory
    try:
        yield
    finally:
        lock.release()


def remove_stores(store_dir: Path) -> None:
    """Delete what a run tokenised; the lists of what became of each row stay."""
    for directory in store_dir.glob("*"):
        for path in directory.glob("*"):
            if path.name != "rows.jsonl":
                path.unlink()
        outcomes = directory / "rows.jsonl"
        if not outcomes.exists() or not outcomes.stat().st_size:
            shutil.rmtree(directory)


def held_out_mask(rows: Iterable[TokenisedRow], share: float, seed: int) -> NDArray[np.bool_]:
    """For each row whether it is held out. Equal rows fall on the same side, so that none leaks.

    Rows are ranked by a hash of seed and content, so the choice does not depend on their order in the file.
    """
    prefix = b"%d|" % seed
    ranks = _hashes(rows, lambda digest: hashlib.sha256(prefix + digest).digest())
    ranked = np.unique(ranks)
    if len(ranked) < 2:
        raise InvalidDataError(
            f"validation.share={share:g} needs at least 2 different rows, got {len(ranked)}; add rows or leave it out"
        )
    count = min(len(ranked) - 1, max(1, round(share * len(ranked))))
    held: NDArray[np.bool_] = ranks <= ranked[count - 1]
    return held


def count_overlap(training: Iterable[TokenisedRow], validation: Iterable[TokenisedRow]) -> int:
    """Validation rows that stand in the training data token by token."""
    return int(np.isin(_hashes(validation, bytes), _hashes(training, bytes)).sum())


def _hashes(rows: Iterable[TokenisedRow], hashed: Callable[[bytes], bytes]) -> NDArray[np.uint64]:
    """64 bits for each row; two different rows in a million share them with probability 3e-8."""
    return np.fromiter((int.from_bytes(hashed(row.digest)[:8], "big") for row in rows), dtype=np.uint64)


def _remember(lines: list[int], line: int) -> None:
    if len(lines) < _SHOWN_LINES:
        lines.append(line)


def _shown(lines: Sequence[int], number: int) -> str:
    """The first of ``number`` lines."""
    return ", ".join(map(str, lines)) + (", ..." if number > len(lines) else "")
