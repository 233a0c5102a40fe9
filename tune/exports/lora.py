"""A whole tuned model as a LoRA adapter of its base: what ``tune.extraction`` computes, in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from registry import LoraShape
from registry.adapter_config import CONFIG_NAME
from registry.adapter_files import WEIGHTS_NAME
from registry.errors import InvalidArtifactError
from tune.extraction import Extraction, extract_adapter


class StoredWeights(Mapping[str, torch.Tensor]):
    """The tensors of a model directory by name, read when they are asked for."""

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as source:
                self._files |= dict.fromkeys(source.keys(), path)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as source:
            tensor: torch.Tensor = source.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def extract(
    base_dir: Path, tuned_dir: Path, directory: Path, *, base_id: str, rank: int
) -> tuple[LoraShape, Extraction]:
    """Write the adapter into ``directory``.

    Raises:
        InvalidArtifactError: the two models do not have the same weights.
    """
    base, tuned = StoredWeights(base_dir), StoredWeights(tuned_dir)
    if set(base) != set(tuned):
        odd = sorted(set(base) ^ set(tuned))[0]
        raise InvalidArtifactError(
            f"No adapter can be extracted: only one of the two models has the weight {odd}. A quantised model, or one "
            "whose tied embeddings were separated, has no such adapter; export from the model it was made from.",
            code="base_mismatch",
        )
    layers = {
        name.removesuffix(".weight")
        for name in base
        if ".layers." in name and name.endswith(".weight") and base[name].dim() == 2
    }
    extraction = extract_adapter(base, tuned, layers, rank=rank)
    tensors = {}
    for layer, low in extraction.layers.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = low.a.contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = low.b.contiguous()
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    leaves = sorted({layer.rpartition(".")[2] for layer in layers})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id,
        "r": rank,
        "lora_alpha": rank,  # scales by 1: the factors hold the whole change
        "target_modules": leaves,
        "bias": "none",
        "inference_mode": True,
    }
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return LoraShape(rank=rank, alpha=rank, target_modules=leaves), extraction
