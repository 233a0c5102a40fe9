"""How many CPU threads training takes and how they wait, decided in one place. Imports no torch: it must run before it.

Environment (read once, at process start):
    OMP_NUM_THREADS   threads for torch's arithmetic; default: the CPUs this process may use
    OMP_WAIT_POLICY   whether waiting threads spin (ACTIVE) or sleep (PASSIVE). Sleeping is right beside another busy
                      process: spinning for long made ten training steps on 2 CPUs take 22 s instead of 0.6 s.
    GOMP_SPINCOUNT    how often a thread looks before it sleeps, whatever the policy
"""

from __future__ import annotations

import os
from pathlib import Path

from tune.choices import Choice

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


_SPINS_ALONE = "1000"
"""Tokens/s of a LoRA run of capo-tiny with two threads on 2 CPUs, alone and of each of two such runs at once: 2,600 and
2,400 without spinning, about 4,100 and 1,700 with 1,000 spins, 5,200 and 230 with 20,000."""


def prepare_environment(*, shares_cpus: bool = False) -> None:
    """Set what OpenMP reads when torch is first imported; call it before that. What is set already stays.

    ``shares_cpus`` says that an engine or other workers run beside this process on the same CPUs.
    """
    if "OMP_WAIT_POLICY" not in os.environ and not shares_cpus:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS_ALONE)
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
