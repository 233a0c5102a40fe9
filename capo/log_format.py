"""How log lines are written; apart from :mod:`capo.logs`, so that settings need nothing else of it."""

from __future__ import annotations

from enum import StrEnum


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"
