"""What needs a whole engine and no service: repairs of the vLLM plugin, each shown to be needed; what is loaded; the
promises of every engine (engine_contract.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serve import engine_contract

pytestmark = [pytest.mark.engine, pytest.mark.beside]


def run_script(folder: Path, mode: str) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.serve.engine_runs", str(folder), mode]
    # As in an image without a compiler, and where nothing was compiled before.
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=200, env=environment)
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


def test_log_probabilities_need_no_compiler(results: dict[str, dict[str, Any]]) -> None:
    repaired, stock = results["repaired"]["logprobs"], results["stock"]["logprobs"]
    assert stock is None, "stock vLLM has mended this; the repair can go"
    assert [len(of_token) for of_token in repaired["logprobs"]["top_logprobs"]] == [2, 2]
    for of_token in repaired["prompt_logprobs"][1:]:
        ranks = {entry["rank"]: entry["logprob"] for entry in of_token.values()}
        assert ranks[1] == max(ranks.values())


def test_a_seeded_answer_does_not_hang_on_how_its_prompt_was_cut(results: dict[str, dict[str, Any]]) -> None:
    alone, behind_another = results["repaired"]["seeded"]
    assert alone == behind_another[1:]
    assert results["stock"]["seeded"] == [None, None], "stock vLLM has mended this; the repair can go"


def test_log_probabilities_of_a_prompt_are_of_its_own_adapter_whoever_else_is_answered(
    results: dict[str, dict[str, Any]],
) -> None:
    found = results["repaired"]["prompt_logprobs"]
    assert [len(each) for each in found["alone"]] == [6, 8, 199, 200, 10]
    for beside, alone in zip(found["beside"], found["alone"], strict=True):
        assert beside == pytest.approx(alone, rel=0.05, abs=0.3), "bfloat16 rounds otherwise in another step"
    assert found["alone"][0] != pytest.approx(found["alone"][1][:6], abs=1), "the adapter on the head counts"


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
