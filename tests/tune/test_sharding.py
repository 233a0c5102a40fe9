"""A model in parts among processes, against one process that holds it whole: the same losses, weights and artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from registry import Registry
from registry.errors import InvalidRequestError
from tests.sizes import LONG
from tests.tune.samples import chat_rows, write_jsonl
from tests.tune.workshop import Workshop
from tune.recipe_file import parse_recipe


def train_in_processes(root: Path, runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each run what each of its processes says."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.tune.processes_run", str(root)],
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes: list[list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


def weights_in(outcome: dict[str, Any]) -> dict[str, torch.Tensor]:
    (path,) = Path(outcome["artifact"]).glob("*.safetensors")
    return load_file(path)


METHODS: dict[str, dict[str, Any]] = {"lora": {"kind": "lora"}, "full": {"kind": "full"}}
if LONG:
    METHODS |= {
        "dora": {"kind": "dora"},
        "freeze": {"kind": "freeze", "last_layers": 1},
        "extracted": {"kind": "full", "extract_lora_rank": 4},
    }


def runs_of(workshop: Workshop, name: str) -> list[dict[str, Any]]:
    """33 rows in steps of 8: the last step of an epoch has one row, so one process has none; 12 steps."""
    stage = workshop.sft(validation={"share": 0.18}, micro_batch_size=2, gradient_accumulation_steps=4, epochs=2.4)
    stage |= {"evaluate_every_steps": 4, "final_weights": "best", "max_grad_norm": 0.5}
    recipe = workshop.recipe(method=METHODS[name], stages=[stage], save_dtype="float32", parallel="sharded")
    one, two = {"recipe": recipe, "processes": 1}, {"recipe": recipe, "processes": 2}
    most = 6 if LONG else 4 if name == "full" else 2  # checkpoints of an adapter are as they are without sharding
    return [
        one | {"work": f"{name}-alone"},
        two | {"work": f"{name}-two"},
        two | {"work": f"{name}-stopped", "stop_after": 6},
        two | {"work": f"{name}-stopped"},
        two | {"work": f"{name}-fewer", "stop_after": 6},
        one | {"work": f"{name}-fewer"},
    ][:most]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """What the runs of each method said."""
    root = tmp_path_factory.mktemp("sharded")
    write_jsonl(root / "chat.jsonl", chat_rows(40))
    workshop = Workshop(root, base_dir, Registry(root / "registry"))
    runs = {name: runs_of(workshop, name) for name in METHODS}
    outcomes = iter(train_in_processes(root, [run for several in runs.values() for run in several]))
    return {name: [next(outcomes) for _ in several] for name, several in runs.items()}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_with_half_a_model_each_train_as_one_with_all_of_it(
    trained: dict[str, list[list[dict[str, Any]]]], name: str
) -> None:
    (alone,), (first, second), *_ = trained[name]
    assert len(alone["losses"]) == 12
    assert alone["losses"][-1] < alone["losses"][0] - 0.1, "the comparison means something only if the weights moved"
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert first["artifact"] == second["artifact"]
    expected, got = weights_in(alone), weights_in(first)
    assert expected.keys() == got.keys()
    for tensor_name, tensor in expected.items():
        assert torch.allclose(got[tensor_name], tensor, atol=1e-3), tensor_name
    for figure, value in alone["metrics"].items():
        assert first["metrics"][figure] == pytest.approx(value, abs=1e-4), figure


@pytest.mark.parametrize("name", METHODS if LONG else ["full"])
def test_a_sharded_run_that_is_stopped_goes_on_to_the_same_bits(
    trained: dict[str, list[list[dict[str, Any]]]], name: str
) -> None:
    (alone,), (whole, _), (before, _), (after, _), *fewer = trained[name]
    assert len(before["losses"]) == 6
    assert before["losses"] + after["losses"] == whole["losses"]
    expected, got = weights_in(whole), weights_in(after)
    assert all(torch.equal(got[tensor_name], tensor) for tensor_name, tensor in expected.items())
    if fewer:  # the long form: it goes on in one process
        losses = [loss for outcomes in fewer for loss in outcomes[0]["losses"]]
        assert losses == pytest.approx(alone["losses"], abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_process_holds_half_the_base_and_all_of_a_small_adapter(
    trained: dict[str, list[list[dict[str, Any]]]], name: str
) -> None:
    (alone,), (first, _), *_ = trained[name]
    held, model = first["events"]["parameter_bytes"], first["events"]["model_bytes"]
    adapter = 4 * first["events"]["trained_parameters"] if METHODS[name]["kind"] in ("lora", "dora") else 0
    assert held - adapter == pytest.approx((model - adapter) / 2, rel=0.01)
    assert "parameter_bytes" not in alone["events"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": {"kind": "qlora"}}, "4-bit blocks of method.kind='qlora' cannot be cut"),
        ({"method": {"kind": "full"}, "dtype": "float16"}, "knows no gradient scaler"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(
    workshop: Workshop, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        parse_recipe(workshop.recipe(parallel="sharded") | changes)


def test_an_optimizer_that_takes_whole_weights_is_refused(workshop: Workshop) -> None:
    stages = [workshop.sft(optimizer="adamw_8bit")]
    with pytest.raises(InvalidRequestError, match="'adamw_8bit' takes whole ones only; give adamw"):
        parse_recipe(workshop.recipe(parallel="sharded", method={"kind": "full"}, stages=stages))
    parse_recipe(workshop.recipe(parallel="sharded", stages=stages))
