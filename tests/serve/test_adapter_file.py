"""How the engine's process reads adapter files: the same tensors as the stock reader gives, and nothing left behind."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from bench.adapters import write_random_adapter
from registry import locate_base_model
from serve.vllm_plugin import adapter_file
from serve.vllm_plugin.adapter_file import AdapterFile

NUM_TENSORS = 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tensors = {f"t{number}": torch.randn(300, 400).to(dtypes[number % 3]) for number in range(NUM_TENSORS)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path / "adapter_model.safetensors"


def read(opener: Callable[..., AdapterFile], path: Path) -> dict[str, torch.Tensor]:
    with opener(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping


def bytes_left_by_one_read(opener: Callable[..., AdapterFile], path: Path, *, reads: int = 50) -> float:
    for _ in range(5):
        read(opener, path)
    tracemalloc.start()
    try:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(reads):
            read(opener, path)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / reads


def test_the_tensors_are_those_of_the_stock_reader(path: Path) -> None:
    ours, stock = read(AdapterFile, path), read(safetensors.safe_open, path)
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) and ours[name].dtype == stock[name].dtype for name in stock)


def test_reading_leaves_nothing_behind(path: Path) -> None:
    assert bytes_left_by_one_read(AdapterFile, path) < 100


def test_the_stock_reader_leaks(path: Path) -> None:
    """What the reader above is for. When this fails, safetensors has mended it."""
    assert bytes_left_by_one_read(safetensors.safe_open, path) > 40 * NUM_TENSORS


def test_vllm_loads_an_adapter_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora import lora_model
    from vllm.lora.peft_helper import PEFTHelper

    base = locate_base_model("capo-tiny")
    folder = write_random_adapter(tmp_path / "adapter", base, rank=4, seed=1)
    monkeypatch.setattr(lora_model, "safetensors", lora_model.safetensors)  # put back afterwards
    adapter_file.use(lora_model)
    opened: list[Path] = []
    monkeypatch.setattr(AdapterFile, "__exit__", lambda self, *error: opened.append(folder))
    modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
    loaded = lora_model.LoRAModel.from_local_checkpoint(
        str(folder), modules, peft_helper=helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    assert len(loaded.loras) == 6 * len(modules)
    assert opened == [folder]
