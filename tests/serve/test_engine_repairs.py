"""Repairs of the vLLM plugin that need a whole engine; each is shown to be needed."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


def run_script(folder: Path, mode: str) -> dict[str, list[str]]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.serve.nan_recovery", str(folder), mode]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.engine
def test_a_nan_adapter_leaves_no_trace_in_later_answers(tmp_path: Path) -> None:
    """KV blocks that another request filled with NaN are zeroed before they are used again (vllm#50283)."""
    with ThreadPoolExecutor() as both:
        result, stock = both.map(lambda mode: run_script(tmp_path / mode, mode), ("repaired", "stock"))
    assert result["after"] == result["before"]
    assert stock["after"] != stock["before"], "stock vLLM has mended this; the repair can go"
