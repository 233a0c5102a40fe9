"""What needs a whole engine and no service: repairs of the vLLM plugin, each shown to be needed; what is loaded; the
promises of every engine (engine_contract.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serve import engine_contract

pytestmark = pytest.mark.engine


def run_script(folder: Path, mode: str) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.serve.nan_recovery", str(folder), mode]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By mode: ``repaired``, ``stock``."""
    modes = ("repaired", "stock")
    with ThreadPoolExecutor() as both:
        return dict(
            zip(modes, both.map(lambda mode: run_script(tmp_path_factory.mktemp(mode), mode), modes), strict=True)
        )


def test_a_nan_adapter_leaves_no_trace_in_later_answers(results: dict[str, dict[str, Any]]) -> None:
    """KV blocks that another request filled with NaN are zeroed before they are used again (vllm#50283)."""
    repaired, stock = results["repaired"], results["stock"]
    assert repaired["after"] == repaired["before"]
    assert stock["after"] != stock["before"], "stock vLLM has mended this; the repair can go"


def test_the_engine_holds_exactly_the_adapters_that_the_pool_believes_in(results: dict[str, dict[str, Any]]) -> None:
    steps = results["repaired"]["ids"]
    assert [step["step"] for step in steps if step["engine"] != step["pool"]] == []
    held = [len(step["engine"]) for step in steps]
    assert held == [0, 1, 2, 2, 2, 2, 2, 1, 1, 1, 0]
    assert len({tuple(step["engine"]) for step in steps}) == 8, "only what was refused changes nothing"


def test_the_engine_keeps_every_promise(results: dict[str, dict[str, Any]]) -> None:
    found = results["repaired"]["promises"]
    assert list(found) == engine_contract.names()
    assert {name: trouble for name, trouble in found.items() if trouble} == {}
