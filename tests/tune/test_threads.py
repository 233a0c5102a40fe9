"""How many threads training takes, and from where the number comes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tune import threads
from tune.threads import choose_threads


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [("150000 100000", 1), ("400000 100000", 4), ("50000 100000", 1), ("max 100000", 8), (None, 8)],
)
def test_a_container_limit_bounds_the_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpu_max: str | None, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    limit = tmp_path / "cpu.max"
    if cpu_max is not None:
        limit.write_text(cpu_max + "\n")
    monkeypatch.setattr(threads, "_CPU_MAX", limit)
    assert choose_threads().value == expected


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    choice = choose_threads()
    assert (choice.value, choice.reason) == (3, "OMP_NUM_THREADS")
