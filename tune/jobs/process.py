"""Linux facts the worker builds on: how a process learns that its parent died, how it ended, and who is whose child."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

from registry.errors import InternalError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NAME_BYTES = 15  # the kernel keeps this many of a process's name: proc_pid_comm(5)


def die_with_parent(parent_pid: int, signal_number: signal.Signals) -> None:
    """Have the kernel send ``signal_number`` to this process when its parent ends, however it ends.

    The kernel watches the parent's *thread* that started this process (prctl(2), PR_SET_PDEATHSIG), so the
    parent must start it from a thread that lives as long as itself.

    Raises:
        InternalError: the parent is gone already, or the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        raise InternalError(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_pid:
        raise InternalError(f"the parent process {parent_pid} has ended before this one could watch it")


def name_process(name: str) -> None:
    """What ``ps`` and :func:`kill_children` call this process: the first 15 bytes of ``name``."""
    Path("/proc/self/comm").write_text(name[:_NAME_BYTES])


def kill_children(parent_pid: int, name: str) -> list[int]:
    """SIGKILL the children of a process that were given this name; their pids. Nothing where they cannot be seen."""
    killed = []
    for task in Path(f"/proc/{parent_pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in map(int, task.read_text().split()):
                if Path(f"/proc/{pid}/comm").read_text().rstrip("\n") == name[:_NAME_BYTES]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
    return killed


def describe_exit(exit_code: int) -> str:
    """An exit code of :mod:`multiprocessing` (negative = signal) for people."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = ", often out of memory" if exit_code == -signal.SIGKILL else ""
    return f"{name}{hint}"
