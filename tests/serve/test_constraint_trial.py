"""What vLLM's event loop would do for each request of a constraint is timed, and bounded, by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve.constraints import SLOWEST_READING_SECONDS
from serve.vllm_plugin.constraint_trial import read


def schema_of(number: int, **string: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"a{each}": string for each in range(number)}, "required": ["a0"]}


NESTED = {f"a{each}": {"type": "string", "pattern": f"^((a{{1,100}}){{1,100}}){{1,{50 + each}}}$"} for each in range(6)}
RANGES = {f"a{each}": {"type": "number", "minimum": -9.123456 - each, "maximum": 71992.547409} for each in range(500)}


@pytest.mark.parametrize("properties", [NESTED, RANGES], ids=["nested repetitions", "ranges of numbers"])
def test_a_schema_that_takes_long_to_read_is_refused_however_cheap_it_is_then(properties: dict[str, Any]) -> None:
    with pytest.raises(TimeoutError, match="s to read, at each request"):
        read("json", {"type": "object", "properties": properties}, SLOWEST_READING_SECONDS)


@pytest.mark.parametrize(
    ("kind", "specification"),
    [
        ("json", schema_of(700, type="string", description="of which there are many")),
        ("json", schema_of(50, type="number", minimum=0, maximum=1)),
        ("regex", "^[A-Z]{2,3}-[0-9]+$"),
        ("choice", [f"choice {number}" for number in range(1024)]),
        ("json_object", True),
    ],
    ids=lambda value: str(value)[:30],
)
def test_ordinary_ones_are_not(kind: str, specification: Any) -> None:
    read(kind, specification, SLOWEST_READING_SECONDS)


A_TRIAL_AT_WORK = """
import multiprocessing
from serve.vllm_plugin.constraint_trial import serve_trials

context = multiprocessing.get_context("forkserver")
multiprocessing.set_forkserver_preload(["fork_server"])
connection, theirs = context.Pipe()
context.Process(target=serve_trials, args=(theirs, None, 1.0, 1.0), daemon=True).start()
connection.recv()
"""
# As serve.engine_preload, without vLLM.
A_FORK_SERVER = "from serve.vllm_plugin import die_with_parent; die_with_parent()"
# The first that a trial imports.
A_TORCH_THAT_COMPUTES_FOR_EVER = """
import os
print(os.getpid(), flush=True)
while True:
    pass
"""


def test_a_trial_at_work_ends_with_the_service_however_that_ends(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(A_TORCH_THAT_COMPUTES_FOR_EVER)
    (tmp_path / "fork_server.py").write_text(A_FORK_SERVER)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    service = subprocess.Popen(
        [sys.executable, "-c", A_TRIAL_AT_WORK],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert service.stdout is not None
    with service, service.stdout:
        trial = psutil.Process(int(service.stdout.readline()))
        try:
            service.send_signal(signal.SIGKILL)
            _, alive = psutil.wait_procs([trial], timeout=10)
            assert not alive
        finally:
            if trial.is_running():
                trial.kill()
