"""Planned bytes against tensors: those of files, those of vLLM's own layers, and sums written out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capo.capacity import GIB, Wish, plan
from capo.model_shape import read_shape
from registry import locate_base_model
from registry.errors import InvalidRequestError
from registry.safetensors_header import read_header

TINY = locate_base_model("capo-tiny").path
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_600M = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2_500M = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
WISH = Wish(memory_bytes=80 * GIB, is_gpu=True, max_loras=8, max_lora_rank=16, concurrency=32)


def config(directory: Path, values: dict[str, Any]) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("values", "parameters"),
    [
        (LLAMA_8B, 8_030_261_248),  # meta-llama/Llama-3-8B, as its model card's files add up
        (QWEN3_600M, 596_049_920),  # Qwen/Qwen3-0.6B
        (QWEN2_500M, 494_032_768),  # Qwen/Qwen2.5-0.5B
    ],
)
def test_the_parameters_of_known_models_come_out(tmp_path: Path, values: dict[str, Any], parameters: int) -> None:
    assert read_shape(config(tmp_path, values)).num_parameters() == parameters
    assert plan(tmp_path / "config.json", WISH).weights_bytes == 2 * parameters


def test_formula_and_files_agree_on_the_embedded_model() -> None:
    header = read_header(TINY / "model.safetensors")
    measured = sum(tensor.end - tensor.begin for tensor in header.tensors.values())
    planned = plan(TINY, WISH)
    assert planned.weights_from == "safetensors headers"
    assert planned.weights_bytes == measured == 2 * read_shape(TINY).num_parameters()


def test_the_slots_of_a_llama_are_what_the_sums_by_hand_say(tmp_path: Path) -> None:
    rank, hidden, inner, vocabulary = 16, 4096, 14336, 128256
    attention = rank * (hidden + 4096) + 2 * rank * (hidden + 1024) + rank * (4096 + hidden)
    mlp = 2 * rank * (hidden + inner) + rank * (inner + hidden)
    vocabularies = 2 * rank * (vocabulary + hidden)
    path = config(tmp_path, LLAMA_8B)
    assert plan(path, WISH).slot_bytes == 2 * (32 * (attention + mlp) + vocabularies)
    only = replace(WISH, target_modules=("q_proj", "down_proj"))
    packed = rank * (hidden + 4096) + 2 * rank * (hidden + 1024)
    assert plan(path, only).slot_bytes == 2 * 32 * (packed + rank * (inner + hidden)), "q brings k and v with it"


def test_slots_and_cache_are_what_a_running_engine_was_measured_to_have() -> None:
    """vLLM 0.32 with capo-tiny, --max-loras 3, --max-lora-rank 16, bfloat16: bytes of every lora_a_stacked and
    lora_b_stacked in its model, and page and block size of its FullAttentionSpec, in each of 6 layers.
    """
    measured = {
        "embed_tokens": 221_184, "qkv_proj": 737_280, "o_proj": 294_912, "gate_up_proj": 884_736,
        "down_proj": 442_368, "lm_head": 221_184,
    }  # fmt: skip
    wish = replace(WISH, max_loras=3, context_tokens=128)
    layers = read_shape(TINY).adapter_layers(None)
    assert {layer.name: 3 * 2 * layer.elements(16) for layer in layers} == measured
    assert plan(TINY, wish).slots_bytes == sum(measured.values())
    assert plan(TINY, wish).kv_bytes_per_request == 6 * 65_536


def test_the_cache_of_a_llama_is_that_times_its_tokens_in_whole_blocks(tmp_path: Path) -> None:
    planned = plan(config(tmp_path, LLAMA_8B), replace(WISH, context_tokens=1000))
    assert planned.kv_bytes_per_token == 131_072
    assert planned.kv_bytes_per_request == 131_072 * 1008
    assert planned.kv_bytes == 32 * planned.kv_bytes_per_request


def test_what_is_left_and_what_would_fit_agree_with_each_other(tmp_path: Path) -> None:
    path = config(tmp_path, LLAMA_8B)
    planned = plan(path, WISH)
    parts = planned.weights_bytes + planned.slots_bytes + planned.kv_bytes + planned.reserve_bytes
    assert planned.left_bytes == 76 * GIB - parts > 0, "an engine may take 95 % of the GPU"
    for wish, fits in (
        (replace(WISH, max_loras=planned.most_slots), True),
        (replace(WISH, max_loras=planned.most_slots + 1), False),
        (replace(WISH, concurrency=planned.most_requests), True),
        (replace(WISH, concurrency=planned.most_requests + 1), False),
    ):
        assert (plan(path, wish).left_bytes >= 0) is fits


def test_what_is_said_to_fit_is_what_the_printed_arguments_ask_for() -> None:
    concurrency = plan(TINY, replace(WISH, memory_bytes=4 * GIB)).most_requests
    for asked, fits in ((concurrency, True), (concurrency + 1, False)):
        planned = plan(TINY, replace(WISH, memory_bytes=4 * GIB, concurrency=asked))
        parts = planned.weights_bytes + planned.slots_bytes + planned.kv_bytes + planned.reserve_bytes
        granted = float(planned.arguments[planned.arguments.index("--gpu-memory-utilization") + 1]) * 4 * GIB
        assert (parts <= granted) is (planned.left_bytes >= 0) is fits
        assert any("95 % is what can be asked for" in reason for reason in planned.reasons) is not fits
    on_a_cpu = plan(TINY, replace(WISH, memory_bytes=4 * GIB, is_gpu=False))
    assert on_a_cpu.usable_bytes == 4 * GIB


def test_ranks_between_those_of_vllm_take_the_next_one(tmp_path: Path) -> None:
    planned = plan(config(tmp_path, QWEN3_600M), replace(WISH, max_lora_rank=20))
    assert planned.max_lora_rank == 32
    assert "--max-lora-rank 32" in " ".join(planned.arguments)
    assert planned.reasons


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bytes": 0}, "memory=0"),
        ({"target_modules": ()}, "target_modules names none"),
        ({"max_lora_rank": 513}, "above 512"),
        ({"target_modules": ("query",)}, "query: this model has none such"),
        ({"context_tokens": 10**6}, "above 8192"),
        ({"dtype": "int4"}, "int4"),
    ],
)
def test_what_no_engine_takes_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        plan(config(tmp_path, LLAMA_8B), replace(WISH, **change))


@pytest.mark.parametrize("text", ["", "[]", '{"model_type": "mixtral"}', '{"model_type": "llama"}'])
def test_a_model_that_cannot_be_planned_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidRequestError):
        plan(tmp_path, WISH)


@pytest.mark.parametrize("size", [-1, 0.5, 1e999])
@pytest.mark.parametrize("name", [name for name, value in LLAMA_8B.items() if type(value) is int])
def test_a_model_with_a_size_that_none_has_is_refused(tmp_path: Path, name: str, size: float) -> None:
    with pytest.raises(InvalidRequestError, match="another form"):
        plan(config(tmp_path, LLAMA_8B | {name: size}), WISH)


def capo_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "capo", "plan", *arguments], capture_output=True, text=True)


def test_the_command_prints_a_table_or_json_and_says_by_its_code_whether_it_fits() -> None:
    table = capo_plan("capo-tiny", "--memory", "2G", "--concurrency", "4", "--disk", "1G")
    assert table.returncode == 0, table.stderr
    assert "--kv-cache-memory-bytes 25165824" in table.stdout
    assert "fit on the disk" in table.stdout
    small = capo_plan("capo-tiny", "--gpu-memory", "1G", "--json")
    assert small.returncode == 1
    assert json.loads(small.stdout)["fits"] is False
    for wrong in (("--memory", "much"), ("--gpu-memory", "0"), ("--memory", "0.5"), ("--target-modules", ",")):
        refused = capo_plan(*wrong)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr


def test_planning_needs_neither_torch_nor_vllm() -> None:
    script = "import sys, capo.capacity, capo.cli.plan; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
