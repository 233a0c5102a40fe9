"""What a cluster must be able to do to have jobs worked in it; Kubernetes and Ray are behind this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from registry.errors import UnavailableError

NAME_PREFIX = "capo-"

LaunchState = Literal["waiting", "running", "ended"]


@dataclass(frozen=True, slots=True)
class Launch:
    """A worker that was launched for a job, as the cluster tells of it."""

    name: str
    """See :func:`launch_name`."""
    job_id: str
    state: LaunchState
    reason: str | None = None
    """Why it does not run, or what it ended with; for people."""


class LaunchRefusedError(UnavailableError):
    """The cluster does not take a launch now; ``retry_after_seconds`` says when to ask again, where it is known."""

    default_code = "launch_refused"


class Cluster(Protocol):
    """Runs workers of one job each. Methods block.

    All raise :class:`LaunchRefusedError` when the cluster does not answer or says no.
    """

    def launches(self) -> list[Launch]:
        """What was launched and is not yet forgotten by the cluster."""
        ...

    def launch(self, name: str, *, job_id: str, tenant: str, gpus: int) -> None:
        """Start a worker; nothing where one of this name was started before."""
        ...

    def remove(self, launch: Launch) -> None:
        """End it, if it has not ended, and forget it; nothing where it is gone already."""
        ...

    def close(self) -> None: ...


def launch_name(job_id: str, epoch: int) -> str:
    """One name for each attempt: a job's epoch grows with every claim, so that two launchers, or one that was started
    again, launch the same attempt only once."""
    return f"{NAME_PREFIX}{job_id}-{epoch}"
