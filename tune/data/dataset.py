"""A stage's files as examples, with every row accounted for: used, truncated or dropped, by line.

Knows rows and masks; knows nothing of batches, models or the registry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from registry.errors import InvalidDataError
from tune.data.mask import ChatEncoder, Example, Tokenizer, encode_text
from tune.data.rows import read_chat_rows, read_text_rows

_SHOWN_LINES = 10


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """All examples of one row; they stay together when rows are held out."""

    examples: tuple[Example, ...]

    @property
    def digest(self) -> bytes:
        """Equal for rows with equal tokens."""
        sha = hashlib.sha256()
        for example in self.examples:
            sha.update(example.token_ids.tobytes() + b"|" + example.trained.tobytes() + b"||")
        return sha.digest()


@dataclass(slots=True)
class RowAccount:
    """Where a file's rows went. ``rows_truncated`` are among ``rows_used``."""

    path: Path
    """As written in the recipe."""
    sha256: str
    rows_used: int = 0
    rows_truncated: int = 0
    rows_dropped: int = 0
    split_rows: int = 0
    """Rows that became several examples, because one could not hold all trained turns as serving sees them."""
    lines_truncated: list[int] = field(default_factory=list)
    """The first ten."""
    lines_dropped: list[int] = field(default_factory=list)
    """The first ten."""

    @property
    def lost_something(self) -> bool:
        return self.rows_truncated + self.rows_dropped > 0

    def sentence(self) -> str:
        text = f"{self.path}: {self.rows_used} rows used"
        if self.rows_truncated:
            text += f", {self.rows_truncated} of them truncated (lines {_shown(self.lines_truncated)})"
        if self.rows_dropped:
            text += f", {self.rows_dropped} dropped (lines {_shown(self.lines_dropped)})"
        if self.split_rows:
            text += f", {self.split_rows} split into one example for each trained turn"
        return text


class DatasetReader:
    """Reads files of one stage kind. Holds the tokenizer; keeps no rows."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        kind: Literal["sft", "cpt"],
        max_length: int,
        over_length: Literal["truncate", "drop", "refuse"],
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder = ChatEncoder(tokenizer) if kind == "sft" else None
        self._max_length = max_length
        self._over_length = over_length

    def read(self, path: Path, *, shown_as: Path) -> tuple[list[EncodedRow], RowAccount]:
        """Encode a whole file.

        Raises:
            InvalidDataError: at the first faulty row; and when no row is left to train on.
            NotFoundError: there is no such file.
        """
        account = RowAccount(path=shown_as, sha256=_digest_of(path))
        rows = []
        for line, examples in self._encoded(path):
            kept = self._fitted(examples, line, account)
            if kept:
                rows.append(EncodedRow(kept))
                account.rows_used += 1
            else:
                account.rows_dropped += 1
                _remember(account.lines_dropped, line)
        if not rows:
            reason = (
                f"none of the {account.rows_dropped} rows of {shown_as} has a trained token within {self._max_length}"
            )
            raise InvalidDataError(f"{reason} tokens; raise max_length or shorten the rows", code="nothing_to_train")
        return rows, account

    def _encoded(self, path: Path) -> Iterator[tuple[int, list[Example]]]:
        if self._encoder is not None:
            for chat_row in read_chat_rows(path):
                yield chat_row.line, self._encoder.encode(chat_row)
        else:
            for text_row in read_text_rows(path):
                yield text_row.line, encode_text(self._tokenizer, text_row, self._max_length)

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
        if kept and longest > self._max_length:
            account.rows_truncated += 1
            _remember(account.lines_truncated, line)
        if len(kept) > 1 and self._encoder is not None:
            account.split_rows += 1
        return kept


def hold_out(rows: Sequence[EncodedRow], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split into (kept, held out) indices. Equal rows fall on the same side, so that none leaks.

    Rows are ranked by a hash of seed and content, so the choice does not depend on their order in the file.
    """
    digests = [row.digest for row in rows]
    ranked = sorted(set(digests), key=lambda digest: hashlib.sha256(b"%d|" % seed + digest).digest())
    if len(ranked) < 2:
        raise InvalidDataError(
            f"validation.share={share:g} needs at least 2 different rows, got {len(ranked)}; add rows or leave it out"
        )
    count = min(len(ranked) - 1, max(1, round(share * len(ranked))))
    held = set(ranked[:count])
    kept = [index for index, digest in enumerate(digests) if digest not in held]
    return kept, [index for index, digest in enumerate(digests) if digest in held]


def count_overlap(training: Sequence[EncodedRow], validation: Sequence[EncodedRow]) -> int:
    """Validation rows that stand in the training data token by token."""
    seen = {row.digest for row in training}
    return sum(row.digest in seen for row in validation)


def _digest_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError):
        return ""  # the reader reports it in its own words


def _remember(lines: list[int], line: int) -> None:
    if len(lines) < _SHOWN_LINES:
        lines.append(line)


def _shown(lines: Sequence[int]) -> str:
    return ", ".join(map(str, lines)) + (", ..." if len(lines) == _SHOWN_LINES else "")
