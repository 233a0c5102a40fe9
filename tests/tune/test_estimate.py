"""The estimate before a run against what is then seen, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sizes import LONG
from tests.tune.samples import chat_rows, message, write_jsonl

# Prints [peak bytes, seconds]; what is estimated leaves out reading data, checkpoints and publishing.
ESTIMATE = """
import json, sys
from pathlib import Path
from tune.cli import rehearse_recipe
found = rehearse_recipe(Path(sys.argv[1]), Path(sys.argv[2]))
print(json.dumps([found.peak_bytes, found.seconds - found.load_seconds]))
"""
RUN = """
import json, sys, time
from pathlib import Path
import torch
from registry import Registry
from tune.cli import tune_recipe
from tune.memory import peak_bytes
from tune import stage_runs
spent = []
plain_train, plain_evaluate = stage_runs.train_stage, stage_runs.evaluate
def timed(work):
    def call(*given, **named):
        started = time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            spent.append(time.perf_counter() - started)
    return call
stage_runs.train_stage, stage_runs.evaluate = timed(plain_train), timed(plain_evaluate)
tune_recipe(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
print(json.dumps([peak_bytes(torch.device("cpu")), sum(spent)]))
"""


def start(code: str, *given: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, given)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def figures_of(process: subprocess.Popen[str]) -> list[float]:
    output, errors = process.communicate(timeout=1500)
    assert process.returncode == 0, errors[-3000:]
    figures: list[float] = json.loads(output.splitlines()[-1])
    return figures


def varied_rows(number: int) -> list[dict[str, Any]]:
    rows = chat_rows(number)
    for index, row in enumerate(rows):
        row["messages"].insert(0, message("system", "Answer in one short sentence. " * (1 + index * 7 % 23)))
    return rows


def compare(root: Path, base: str, method: str, micro_batch_size: int, steps: int) -> None:
    write_jsonl(root / "chat.jsonl", varied_rows(240))
    stage = {
        "kind": "sft",
        "data": [{"path": "chat.jsonl"}],
        "max_steps": steps,
        "micro_batch_size": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
    }
    recipe = root / "recipe.json"
    recipe.write_text(json.dumps({"name": "x", "base_model": base, "method": {"kind": method}, "stages": [stage]}))
    estimating = start(ESTIMATE, recipe, root / "registry")
    if LONG:
        estimating.wait()  # neither should slow the other; its few lines fit into the pipes
    running = start(RUN, recipe, root / "registry", root / "work")
    estimated, seen = figures_of(estimating), figures_of(running)
    print(f"{base} {method} x{micro_batch_size}: estimated {estimated}, seen {seen}")
    assert estimated[0] == pytest.approx(seen[0], rel=0.2), "peak memory"
    if LONG:  # the short form trains for too few seconds, on a machine that others use
        assert estimated[1] == pytest.approx(seen[1], rel=0.2), "seconds"


CASES = [("lora", 2), ("lora", 8), ("full", 2), ("full", 8)]


@pytest.mark.parametrize(("method", "micro_batch_size"), CASES if LONG else [("lora", 8)])
def test_the_estimate_for_capo_tiny_is_within_a_fifth(tmp_path: Path, method: str, micro_batch_size: int) -> None:
    compare(tmp_path, "capo-tiny", method, micro_batch_size, steps=150 if LONG else 4)


if LONG:

    @pytest.mark.timeout(3000)
    @pytest.mark.parametrize(("method", "micro_batch_size"), [("lora", 1), ("lora", 4), ("full", 1), ("full", 4)])
    def test_the_estimate_for_eighty_million_weights_is_within_a_fifth(
        tmp_path: Path, tokenizer: Any, method: str, micro_batch_size: int
    ) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=640,
            intermediate_size=1728,
            num_hidden_layers=12,
            num_attention_heads=10,
            num_key_value_heads=10,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        assert 60e6 < model.num_parameters() < 100e6
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        compare(tmp_path, str(tmp_path / "base"), method, micro_batch_size, steps=20)
