"""What a serving process is for, one thing or everything, and how workers come to its jobs."""

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


class LauncherKind(StrEnum):
    """See :mod:`tune.jobs.launchers`."""

    LOCAL = "local"
    KUBERNETES = "kubernetes"
    RAY = "ray"
