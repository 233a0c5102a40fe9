"""Adapter files read without a leak.

``safetensors.safe_open(…, framework="pt").get_tensor`` of safetensors 0.8.0 keeps two Python integers, 57 bytes, for
every tensor it gives out and never lets them go: 5 KB for each load of a small adapter, in a process that may load
adapters for months. ``safetensors.torch.load`` of the same file does not.
"""

from __future__ import annotations

from collections.abc import KeysView
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from safetensors.torch import load


class AdapterFile:
    """The part of ``safetensors.safe_open`` that ``vllm/lora/lora_model.py`` uses. An adapter is read as a whole."""

    def __init__(self, path: str | Path, framework: str = "pt", device: str = "cpu") -> None:
        assert (framework, device) == ("pt", "cpu")
        self._tensors: dict[str, torch.Tensor] = load(Path(path).read_bytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._tensors = {}

    def keys(self) -> KeysView[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def use(lora_model: Any) -> None:
    """Have vLLM's module ``vllm.lora.lora_model`` read adapter files with :class:`AdapterFile`."""
    lora_model.safetensors = SimpleNamespace(safe_open=AdapterFile)
