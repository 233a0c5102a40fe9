"""How many CPU threads training takes, decided in one place. Imports no torch, so that it can run before it.

Environment (read once, at process start):
    OMP_NUM_THREADS   threads for torch's arithmetic; default: the CPUs this process may use
    OMP_WAIT_POLICY   default PASSIVE: waiting threads sleep instead of spinning. With another busy process
                      beside it, spinning made ten training steps on 2 CPUs take 22 s instead of 0.6 s.
"""

from __future__ import annotations

import os

from tune.choices import Choice


def prepare_environment() -> None:
    """Set what OpenMP reads when torch is first imported; call it before that. Values already set stay."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def choose_threads() -> Choice[int]:
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return Choice(int(given), "OMP_NUM_THREADS")
    return Choice(len(os.sched_getaffinity(0)), "CPUs this process may use; OMP_NUM_THREADS sets another number")
