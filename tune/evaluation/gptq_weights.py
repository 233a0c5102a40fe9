"""The weights of a GPTQ checkpoint as plain floats, unpacked here, so that any transformers model can hold them.

Format (GPTQModel 7.6, ``nn_modules/qlinear/torch.py``; vLLM reads the same): for a linear layer of I inputs and O
outputs with ``bits`` b, ``qweight`` [I*b/32, O] int32 holds 32/b inputs per number, lowest bits first; ``qzeros``
[G, O*b/32] the zero points less one; ``scales`` [G, O]; ``g_idx`` [I] the group of each input. The weight is
``scales[g] * (q - (zero + 1))``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from registry.errors import InvalidArtifactError


def quantization_of(directory: Path) -> dict[str, object] | None:
    """The ``quantization_config`` of a model directory, ``None`` for a plain model."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    return config if isinstance(config, dict) else None


def plain_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a GPTQ checkpoint, one after another; quantised layers as ``<layer>.weight`` [O, I] float32.

    Raises:
        InvalidArtifactError: it is quantised in another way than 4- or 8-bit GPTQ.
    """
    config = quantization_of(directory) or {}
    bits, method, layout = config.get("bits"), config.get("quant_method"), config.get("checkpoint_format", "gptq")
    if method != "gptq" or layout != "gptq" or bits not in (4, 8):
        raise InvalidArtifactError(
            f"{directory.name} is quantised as {method!r} in {bits} bits (layout {layout!r}); GPTQ in 4 or 8 bits can "
            "be read here.",
            code="unsupported_quantization",
        )
    assert isinstance(bits, int), bits
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as source:
            names = set(source.keys())
            for name in sorted(names):
                layer, _, kind = name.rpartition(".")
                if kind == "qweight":
                    parts = (source.get_tensor(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx"))
                    yield f"{layer}.weight", dequantized(*parts, bits=bits)
                elif f"{layer}.qweight" not in names or kind == "bias":
                    yield name, source.get_tensor(name)


def dequantized(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, *, bits: int
) -> torch.Tensor:
    """[O, I] float32."""
    shifts = torch.arange(0, 32, bits)
    mask = (1 << bits) - 1
    inputs = ((qweight.unsqueeze(1) >> shifts.view(1, -1, 1)) & mask).reshape(-1, qweight.shape[1])  # [I, O]
    zeros = ((qzeros.unsqueeze(2) >> shifts.view(1, 1, -1)) & mask).reshape(qzeros.shape[0], -1) + 1  # [G, O]
    groups = g_idx.long()
    weight = scales.float()[groups] * (inputs - zeros[groups]).float()
    return weight.T.contiguous()
