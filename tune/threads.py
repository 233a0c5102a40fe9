"""How many CPU threads training takes, decided in one place. Imports no torch, so that it can run before it.

Environment (read once, at process start):
    OMP_NUM_THREADS   threads for torch's arithmetic; default: the CPUs this process may use
    OMP_WAIT_POLICY   default PASSIVE: waiting threads sleep instead of spinning. With another busy process
                      beside it, spinning made ten training steps on 2 CPUs take 22 s instead of 0.6 s.
"""

from __future__ import annotations

import os
from pathlib import Path

from tune.choices import Choice

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def prepare_environment() -> None:
    """Set what OpenMP reads when torch is first imported; call it before that. Values already set stay."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def choose_threads() -> Choice[int]:
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return Choice(int(given), "OMP_NUM_THREADS")
    cpus = len(os.sched_getaffinity(0))
    quota = _cgroup_cpus()
    if quota is not None and quota < cpus:
        return Choice(quota, "the container's CPU limit; OMP_NUM_THREADS sets another number")
    return Choice(cpus, "CPUs this process may use; OMP_NUM_THREADS sets another number")


def _cgroup_cpus() -> int | None:
    """Whole CPUs of the container's limit (cgroup v2, ``cpu.max``: quota and period), ``None`` without one.

    More threads than that are stopped by the kernel in turn, each while the others wait for it.
    """
    try:
        quota, period = _CPU_MAX.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return None
