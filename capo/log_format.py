"""How much is logged, and how lines are written; apart from :mod:`capo.logs`, so that settings need no more of it."""

from __future__ import annotations

from enum import StrEnum


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @classmethod
    def _missing_(cls, value: object) -> LogLevel | None:
        """Capitals are taken too: Python's own names of the levels have them."""
        return next((level for level in cls if isinstance(value, str) and level == value.lower()), None)


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"
