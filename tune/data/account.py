"""The whole account of training files before a run: what is in them, what is wrong, and whether they may train.

    account = check_data([Path("train.jsonl")], validation=Path("valid.jsonl"))
    account.may_train, account.faults, account.warnings

A fault must be mended: training stops at the first one. A warning is for a person to judge: the row is used, or cut
or left out in the way that its text says. Every fault and warning has its file and line; the lists are complete.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from tune.data.containers import RawRow
from tune.data.datafile import DataFile, open_data
from tune.data.duplicates import Fingerprints
from tune.data.examine import Examiner, RowFacts
from tune.data.formats import Format
from tune.data.mask import Tokenizer
from tune.data.processes import map_in_processes
from tune.data.rows import FEWEST_ROWS

_ROWS_AT_A_TIME = 400
_WORTH_A_PROCESS_BYTES = 2_000_000
_MOST_PROCESSES = 8


@dataclass(frozen=True, slots=True)
class Finding:
    file: str
    line: int
    kind: str
    reason: str


@dataclass(slots=True)
class FileAccount:
    """One file's share of the account."""

    path: str
    use: Literal["training", "validation"]
    container: str
    format: Format
    why: str
    sha256: str
    rows: int = 0
    faulty_rows: int = 0
    truncated_rows: int = 0
    dropped_rows: int = 0
    """Without a trained token within the limit."""
    total_tokens: int = 0
    trained_tokens: int = 0
    """Within the limit."""

    @property
    def used_rows(self) -> int:
        """Truncated ones included."""
        return self.rows - self.faulty_rows - self.dropped_rows


@dataclass(slots=True)
class Account:
    """Of all files together. Token figures are 0 where no base was named."""

    files: list[FileAccount] = field(default_factory=list)
    max_tokens: int | None = None
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    roles: Counter[str] = field(default_factory=Counter)
    """Messages by role."""
    turns: Counter[int] = field(default_factory=Counter)
    """Rows by their number of assistant messages."""
    personal_data: Counter[str] = field(default_factory=Counter)
    """Rows by kind; a row may count for several."""
    rows_with_system: int = 0
    rows_with_tools: int = 0
    tool_calls: int = 0
    messages_with_weight_0: int = 0
    repeats: Counter[str] = field(default_factory=Counter)
    """Rows that say what an earlier one says: exact_ and near_duplicate, and exact_ and near_overlap, which are
    validation rows that are also training rows."""
    token_lengths: array[int] = field(default_factory=lambda: array("q"))
    """Of each good training row's longest example."""

    @property
    def may_train(self) -> bool:
        """No row has a fault, and there is something to train on."""
        return not self.faults and any(f.used_rows for f in self.files if f.use == "training")

    def quantile(self, share: float) -> int:
        """Tokens that this share of the rows does not exceed."""
        ordered = sorted(self.token_lengths)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


def check_data(
    paths: Sequence[Path],
    *,
    validation: Path | None = None,
    named: Format | None = None,
    ignored_keys: tuple[str, ...] = (),
    tokenizer: Tokenizer | None = None,
    max_tokens: int | None = None,
) -> Account:
    """Read everything once and give the account. Uses several processes for large files.

    Memory grows by an index, of some 150 bytes a row at its peak, and by what was found.

    Raises:
        NotFoundError, InvalidDataError: a file is not there, or is no data file at all.
    """
    account = Account(max_tokens=max_tokens)
    uses: list[tuple[Path, Literal["training", "validation"]]] = [(path, "training") for path in paths]
    if validation is not None:
        uses.append((validation, "validation"))
    with Fingerprints() as prints:
        places = _Places()
        for path, use in uses:
            file = open_data(path, named=named, ignored_keys=ignored_keys)
            sha256 = file.sha256()
            of_file = FileAccount(str(path), use, file.source.container, file.format, file.why, sha256)
            account.files.append(of_file)
            places.begin_file()
            examiner = Examiner(file, tokenizer, max_tokens)
            for facts in _all_facts(file, examiner):
                _count(account, of_file, facts)
                if facts.fault is None:
                    prints.add_print(facts.exact, facts.signed)
                    places.add(facts.line)
        _count_duplicates(account, prints.exact_duplicates(), places, "exact")
        _count_duplicates(account, prints.near_duplicates(), places, "near")
    training_rows = sum(f.rows for f in account.files if f.use == "training")
    if training_rows < FEWEST_ROWS:
        reason = f"{training_rows} rows; OpenAI asks for at least {FEWEST_ROWS}, and advises 50 to 100"
        account.warnings.append(Finding(account.files[0].path, 1, "few_rows", reason))
    order = {of_file.path: number for number, of_file in enumerate(account.files)}
    for findings in (account.faults, account.warnings):
        findings.sort(key=lambda finding: (order[finding.file], finding.line))
    return account


class _Places:
    """Where each row stands that was added: its file, by number, and its line. Eight bytes a row."""

    def __init__(self) -> None:
        self._first_rows: list[int] = []
        self._lines = array("Q")

    def begin_file(self) -> None:
        self._first_rows.append(len(self._lines))

    def add(self, line: int) -> None:
        self._lines.append(line)

    def __getitem__(self, row: int) -> tuple[int, int]:
        return bisect_right(self._first_rows, row) - 1, self._lines[row]


def _all_facts(file: DataFile, examiner: Examiner) -> Iterator[RowFacts]:
    size = sum(path.stat().st_size for path in file.source.files())
    num = min(_MOST_PROCESSES, len(os.sched_getaffinity(0))) if size > _WORTH_A_PROCESS_BYTES else 1
    is_empty = True
    for chunk in map_in_processes(examiner, _chunks(file.source.rows()), num):
        is_empty = False
        yield from chunk
    if is_empty:
        for line, fault in file.rows():
            yield examiner.facts(fault, line)


def _chunks(rows: Iterator[tuple[int, RawRow]]) -> Iterator[list[tuple[int, RawRow]]]:
    while chunk := list(islice(rows, _ROWS_AT_A_TIME)):
        yield chunk


def _count(account: Account, of_file: FileAccount, facts: RowFacts) -> None:
    of_file.rows += 1
    if facts.fault is not None:
        of_file.faulty_rows += 1
        account.faults.append(Finding(of_file.path, facts.line, *facts.fault))
        return
    found = list(facts.warnings)
    if facts.personal:
        found.append(("personal_data", f"holds personal data: {', '.join(facts.personal)}"))
    if account.max_tokens is not None and facts.roles and facts.tokens > account.max_tokens:
        what = f"the row has {facts.tokens} tokens, the limit is {account.max_tokens}"
        if facts.kept_trained_tokens:
            of_file.truncated_rows += 1
            found.append(("over_length", f"{what}: it would be cut"))
        else:
            of_file.dropped_rows += 1
            found.append(("over_length", f"{what}: no trained token lies within, so it would be dropped"))
    account.warnings += [Finding(of_file.path, facts.line, kind, reason) for kind, reason in found]
    of_file.total_tokens += facts.total_tokens
    of_file.trained_tokens += facts.kept_trained_tokens
    if of_file.use == "validation":
        return
    account.roles.update(facts.roles)
    if facts.roles:
        account.turns[facts.roles.count("assistant")] += 1
        account.rows_with_system += facts.roles[0] in ("system", "developer")
    account.rows_with_tools += facts.has_tools
    account.tool_calls += facts.num_tool_calls
    account.messages_with_weight_0 += facts.num_weight_0
    account.personal_data.update(facts.personal)
    if facts.tokens:
        account.token_lengths.append(facts.tokens)


def _count_duplicates(
    account: Account, earlier_of: dict[int, int], places: _Places, how: Literal["exact", "near"]
) -> None:
    """``earlier_of`` goes from a row to an earlier one that says the same."""
    for later, earlier in earlier_of.items():
        file, line = places[later]
        other_file, other_line = places[earlier]
        of_file, other = account.files[file], account.files[other_file]
        where = f"line {other_line}" if file == other_file else f"{other.path} line {other_line}"
        word = "is the same as" if how == "exact" else "is nearly the same as"
        kind = f"{how}_overlap" if of_file.use == "validation" and other.use == "training" else f"{how}_duplicate"
        account.repeats[kind] += 1
        account.warnings.append(Finding(of_file.path, line, kind, f"the row {word} {where}"))
