"""How many threads training takes, and from where the number comes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tune import threads
from tune.threads import choose_threads, prepare_environment


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


@pytest.mark.parametrize(
    ("given", "shares_cpus", "expected"),
    [
        ({}, False, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}),
        ({}, True, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, False, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, False, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, False, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
    ],
)
def test_threads_spin_for_a_moment_only_where_nothing_else_computes_and_nobody_said_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], shares_cpus: bool, expected: dict[str, str]
) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in names:
        # First set, so that the end of the test takes back what prepare_environment sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    prepare_environment(shares_cpus=shares_cpus)
    assert {name: os.environ[name] for name in names if name in os.environ} == expected
