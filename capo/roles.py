"""What a serving process is for: one process may do everything, or the halves run apart and scale apart."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """``infer`` processes are replicas: each has an engine, and they share a registry. One ``control`` process takes
    files and jobs and changes what names mean; it has no engine and imports none. ``all`` is both."""

    ALL = "all"
    INFER = "infer"
    CONTROL = "control"

    @property
    def has_engine(self) -> bool:
        return self is not Role.CONTROL

    @property
    def has_jobs(self) -> bool:
        return self is not Role.INFER
