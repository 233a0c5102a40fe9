"""A LoRA adapter out of whole tuned weights: the best approximation of their change at a given rank.

For each layer the change W_tuned - W_base is cut off after its ``rank`` largest singular values, which no other matrix
of that rank is nearer to (Eckart and Young, 1936). What no adapter can hold (norms, embeddings, biases) is lost, and
counted in the error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """B @ A stands for the change of one layer's weight; float32."""

    a: torch.Tensor
    """[R, in]"""
    b: torch.Tensor
    """[out, R]"""


@dataclass(frozen=True, slots=True)
class Extraction:
    layers: dict[str, LowRank]
    """By the layer's full name."""
    relative_errors: dict[str, float]
    """For each of these layers: Frobenius norm of what is lost over that of the change; 0 where nothing changed."""
    relative_error: float
    """The same over all weights of the model together, those that no adapter can hold included."""
    share_outside: float
    """Frobenius norm of the change that lies outside the layers, over that of the whole change."""


def extract_adapter(
    base: Mapping[str, torch.Tensor],
    tuned: Mapping[str, torch.Tensor],
    layers: Collection[str],
    *,
    rank: int,
    save_dtype: torch.dtype = torch.float32,
) -> Extraction:
    """Approximate ``tuned`` minus ``base``, both by parameter name, by matrices of ``rank`` in ``layers``.

    A parameter ``<layer>.weight`` is [out, in]. The matrices come rounded to ``save_dtype``, and the errors are those
    of the rounded ones. Blocks; one layer at a time is held in float32.
    """
    found: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    lost = outside = whole = 0.0
    for name, weight in tuned.items():
        change = weight.detach().float() - base[name].detach().to(weight.device).float()
        norm = float(change.double().norm()) ** 2
        whole += norm
        layer = name.removesuffix(".weight")
        if layer not in layers:
            outside += norm
            continue
        found[layer] = _rounded(truncate(change, rank), save_dtype)
        left = float((change - found[layer].b @ found[layer].a).double().norm()) ** 2
        errors[layer] = math.sqrt(left / norm) if norm else 0.0
        lost += left
    return Extraction(
        layers=found,
        relative_errors=errors,
        relative_error=math.sqrt((lost + outside) / whole) if whole else 0.0,
        share_outside=math.sqrt(outside / whole) if whole else 0.0,
    )


def truncate(change: torch.Tensor, rank: int) -> LowRank:
    """The nearest [out, in] matrix of ``rank``; the singular values are split evenly between the two factors.

    A layer with fewer singular values than ``rank`` gets zeros for the rest.
    """
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    a = torch.zeros(rank, change.shape[1], device=change.device)
    b = torch.zeros(change.shape[0], rank, device=change.device)
    a[:kept] = root[:, None] * vh[:kept]
    b[:, :kept] = u[:, :kept] * root
    return LowRank(a, b)


def _rounded(matrices: LowRank, dtype: torch.dtype) -> LowRank:
    return LowRank(matrices.a.to(dtype).float(), matrices.b.to(dtype).float())
