"""One service for the proofs that do not need one of their own, and the report of what they measured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry import BaseModel, locate_base_model
from tests.e2e.service import Service, running
from tests.sizes import LONG
from tests.soak.figures import DEFAULT_PATH, Figures

collect_ignore = (
    []
    if LONG
    else [
        "test_planted_secrets.py",
        "test_clean_root.py",
        "test_many_starts.py",
        "test_observability.py",
        "test_prefix_caches.py",
        "test_ray_launcher.py",
        "test_replicas.py",
    ]
)

_FIGURES = pytest.StashKey[Figures]()

# float32, because the greedy answers of random adapters have many near ties: in bfloat16 two candidates are often
# equal to the last bit, and a batch of another shape would decide them otherwise.
ENGINE_ARGUMENTS = ("--workers", "0", "--", "--dtype", "float32")

PATIENT_DRAIN_SECONDS = 120


@pytest.fixture(scope="session")
def base() -> BaseModel:
    return locate_base_model("capo-tiny")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("soak"), *ENGINE_ARGUMENTS) as started:
        yield started


@pytest.fixture(scope="session")
def service_with_two_slots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Service]]:
    """Gives a service with two adapter slots and a patient drain: the one that runs, or a new one if that was ended."""
    arguments = (*ENGINE_ARGUMENTS, "--max-loras", "2")
    started: list[Service] = []
    with contextlib.ExitStack() as services, pytest.MonkeyPatch.context() as environment:
        environment.setenv("CAPO_DRAIN_SECONDS", str(PATIENT_DRAIN_SECONDS))

        def get() -> Service:
            if not started or started[-1].process.poll() is not None:
                started.append(services.enter_context(running(tmp_path_factory.mktemp("two-slots"), *arguments)))
            return started[-1]

        yield get


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    path = Path(os.environ.get("CAPO_SOAK_REPORT", DEFAULT_PATH))
    return pytestconfig.stash.setdefault(_FIGURES, Figures(path, is_full=LONG))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash.get(_FIGURES, None)
    if figures is None or not figures.recorded:
        return
    terminalreporter.section("figures of the long proofs", sep="-")
    for proof, measured in figures.recorded.items():
        terminalreporter.line(f"{proof}: " + ", ".join(f"{name} {value}" for name, value in measured.items()))
