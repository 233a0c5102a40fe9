"""Who holds a job, and when another worker may take it.

A lease ends by silence, and silence is measured with the watcher's own monotonic clock: a watcher that has
seen the same heartbeat count for the whole lease may take the job. Wall clocks of two machines are never
compared, so a clock that jumps by a day neither steals a lease nor keeps one (the price: a worker that has
just started watches for one whole lease first). One short cut is safe: an owner that ran in this very
process namespace and is gone now needs no waiting for.

A wrong guess costs work, not correctness: each claim raises the job's epoch, and the store refuses what the
old owner writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tune.jobs.process import kill_children
from tune.jobs.records import JobRecord


def this_owner() -> str:
    """The calling process as ``boot id/process namespace/pid/start time``; unique until the end of time.

    The start time tells a process from a later one with the same pid (field 22 of proc_pid_stat(5)).
    """
    pid = os.getpid()
    return f"{_namespace()}/{pid}/{_start_time(pid)}"


def end_training(owner: str, job_id: str) -> list[int]:
    """Kill what ``owner`` still trains of a job that it has lost, if it is a process of this machine; the pids.

    A worker that was stopped for longer than its lease has a training process that was stopped too, and holds the
    job's directory until it is gone.
    """
    namespace, _, process = owner.rpartition("/")[0].rpartition("/")
    if namespace != _namespace() or is_gone(owner):
        return []
    return kill_children(int(process), job_id)


def is_gone(owner: str) -> bool:
    """Whether ``owner`` surely lives no more; ``False`` where this process cannot tell."""
    namespace, _, process = owner.rpartition("/")[0].rpartition("/")
    start_time = owner.rpartition("/")[2]
    if namespace != _namespace() or not process.isdigit():
        return False
    return _start_time(int(process)) != start_time


def _namespace() -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{Path('/proc/self/ns/pid').readlink()}"


def _start_time(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name, field 2, may hold spaces and brackets: count from the last bracket.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


class LeaseWatch:
    """Remembers when each running job last showed a sign of life. Belongs to one worker."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}

    def abandoned(self, running: Iterable[JobRecord]) -> list[JobRecord]:
        """Those of ``running`` whose owner is gone or has been silent for its whole lease.

        Call it often: silence is counted from the first call that saw the present heartbeat.
        """
        now = self._clock()
        seen, silent = {}, []
        for job in running:
            sign = (job.epoch, job.heartbeats)
            last_sign, since = self._seen.get(job.id, (sign, now))
            if last_sign != sign:
                since = now
            seen[job.id] = (sign, since)
            if now - since >= job.lease_seconds or (job.owner is not None and is_gone(job.owner)):
                silent.append(job)
        self._seen = seen  # jobs that run no more are forgotten
        return silent
