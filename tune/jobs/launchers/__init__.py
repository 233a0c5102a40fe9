"""How workers come to jobs: processes on this machine, or one worker for each job in a cluster.

A launcher only starts workers and ends those that nobody needs. Who works a job, and whose result counts, is the job
store's business alone (:mod:`tune.jobs.queue`): a launcher that starts one worker too many wastes a start, and no more.
"""

from __future__ import annotations

from typing import Protocol


class Launcher(Protocol):
    """Belongs to one service, and to its event loop. :meth:`watch` runs as a task between the two others."""

    def start(self) -> None: ...

    async def watch(self) -> None:
        """Keep workers coming; returns only when cancelled."""
        ...

    async def stop(self) -> None:
        """End what would outlive the service and should not."""
        ...

    def kill(self) -> None:
        """The same at once, without waiting for anything."""
        ...
