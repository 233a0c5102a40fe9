"""A fault of one row: what every reader of training data raises, with its line and a word for its kind."""

from __future__ import annotations

from typing import Any

from registry.errors import InvalidDataError


class RowFault(InvalidDataError):
    """``kind`` is the word by which ``capo data check`` counts it; ``code`` stays that of all data errors."""

    def __init__(self, message: str, *, kind: str = "invalid_row", **more: Any) -> None:
        super().__init__(message, **more)
        self.kind = kind


def row_fault(line: int, reason: str, kind: str, param: str | None = None) -> RowFault:
    """A fault whose message begins with its line."""
    return RowFault(f"line {line}: {reason}", kind=kind, line=line, param=param)
