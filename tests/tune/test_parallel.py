"""Two processes, started as people start them, against one: the same losses, and one artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from registry import Registry
from tests.sizes import LONG
from tests.tune.workshop import Recorder, Workshop
from tune.session import tensorboard_dir

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611", "-m"],
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=2",
        "--main_process_port=29612",
        "--module",
    ],
}


def losses_in(work_dir: Path) -> list[float]:
    log = EventAccumulator(str(tensorboard_dir(work_dir)))
    log.Reload()
    return [event.value for event in log.Scalars("1-sft/train_loss")]


CASES: list[tuple[str, dict[str, Any]]] = [("torchrun", {"kind": "lora"}), ("accelerate", {"kind": "full"})]


@pytest.mark.parametrize(("launcher", "method"), CASES if LONG else CASES[:1])
def test_two_processes_have_the_losses_of_one_and_publish_once(
    workshop: Workshop, launcher: str, method: dict[str, Any]
) -> None:
    """33 rows in steps of 8: the last step of an epoch has one row, so one process has none."""
    stage = workshop.sft(validation={"share": 0.18}, micro_batch_size=4, gradient_accumulation_steps=2, epochs=2)
    recipe = workshop.recipe(method=method, stages=[stage | {"evaluate_every_steps": 4}], save_dtype="float32")
    alone = Recorder()
    expected = workshop.run(recipe, "alone", alone)
    assert any(len((step.valid_loss and [1]) or []) for step in alone.steps)
    path = workshop.root / "recipe.json"
    path.write_text(json.dumps(recipe))
    registry_dir, work_dir = workshop.root / "registry-of-two", workshop.root / "two"
    done = subprocess.run(
        [
            sys.executable,
            *LAUNCHERS[launcher],
            "tune",
            str(path),
            "--registry",
            str(registry_dir),
            "--work-dir",
            str(work_dir),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (artifact,) = Registry(registry_dir).artifacts()
    assert done.stdout.split() == [artifact.revision]
    assert losses_in(work_dir) == pytest.approx([metrics.train_loss for metrics in alone.steps], abs=1e-5)
    for name, value in expected.metrics.items():
        assert artifact.manifest.metrics[name] == pytest.approx(value, abs=1e-4), name
    (ours,), (theirs,) = (list(a.path.glob("*.safetensors")) for a in (artifact, expected.artifact))
    one, two = load_file(theirs), load_file(ours)
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-3) for name in one)
