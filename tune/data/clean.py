"""What a recipe may ask to be changed about its rows before they are tokenised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from tune.data.duplicates import Fingerprints
from tune.data.faults import RowFault
from tune.data.formats import AnyRow
from tune.data.personal import redact, redacted
from tune.data.preferences import PreferenceRow
from tune.data.rows import ChatRow, TextRow


def redacted_row(row: AnyRow) -> AnyRow:
    """The row with personal data replaced by its kind; an equal row where there is none."""
    if isinstance(row, TextRow):
        return replace(row, text=redact(row.text))
    if isinstance(row, PreferenceRow):
        return replace(row, chosen=_redacted_chat(row.chosen), rejected=_redacted_chat(row.rejected))
    return _redacted_chat(row)


def _redacted_chat(row: ChatRow) -> ChatRow:
    return replace(row, messages=tuple(redacted(message) for message in row.messages))


def with_system_prompt(row: AnyRow, system_prompt: str | None) -> AnyRow:
    """The chat with ``system_prompt`` before it, unless it has a system message of its own."""
    if system_prompt is None or isinstance(row, TextRow):
        return row
    if isinstance(row, PreferenceRow):
        return replace(
            row, chosen=_prompted(row.chosen, system_prompt), rejected=_prompted(row.rejected, system_prompt)
        )
    return _prompted(row, system_prompt)


def _prompted(row: ChatRow, system_prompt: str) -> ChatRow:
    if row.messages[0]["role"] in ("system", "developer"):
        return row
    system = {"role": "system", "content": system_prompt}
    return replace(row, messages=(system, *row.messages), trained=(False, *row.trained))


def duplicates_to_drop(
    files: Iterable[Iterable[tuple[int, AnyRow | RowFault]]], drop: Literal["exact", "near"]
) -> list[dict[int, str]]:
    """For each file the rows to drop, by their place from 0, with the reason. The first of its kind stays.

    Rows of all files are compared with each other. Reads them through.

    Raises:
        RowFault: at the first faulty row.
    """
    sizes = []
    with Fingerprints() as prints:
        for rows in files:
            before = len(prints)
            for _, row in rows:
                if isinstance(row, RowFault):
                    raise row
                prints.add(row)
            sizes.append(len(prints) - before)
        reasons = dict.fromkeys(prints.exact_duplicates(), "exact_duplicate")
        if drop == "near":
            reasons |= dict.fromkeys(prints.near_duplicates(), "near_duplicate")
    dropped: list[dict[int, str]] = []
    start = 0
    for size in sizes:
        dropped.append({row - start: reason for row, reason in reasons.items() if start <= row < start + size})
        start += size
    return dropped
