"""From the model as it was trained to the model as it will be served, in the precision in which it is stored.

What is measured, probed and published is the second one. They differ where an engine cannot serve the first:

    lora           the same
    qlora          the adapter on the base in its own precision; how far that is from the 4-bit base is measured
    dora           merged into the base: vLLM loads no DoRA adapter
    full, freeze   the same
    any of the last two rows with extract_lora_rank: the base with the extracted adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from registry.errors import InvalidArtifactError
from tune.adapters import linear_layers
from tune.comparison import compare
from tune.data.mask import Example
from tune.extraction import extract_adapter
from tune.methods import DoraMethod, FreezeMethod, LoraMethod, LowRankMethod, Method, QloraMethod, extracted_rank
from tune.model import StoredDtypeName, Trainable, load_trainable, round_weights

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Delivery:
    served: Trainable
    """Holds a PEFT adapter where one is published."""
    is_adapter: bool
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()
    """What was done to the trained weights, for a person."""


def deliver(
    trained: Trainable,
    method: Method,
    base_dir: Path,
    *,
    save_dtype: StoredDtypeName,
    compare_on: Sequence[Example],
) -> Delivery:
    """Make the model that is served out of ``trained``, which is used up.

    ``compare_on`` are examples on which the two are compared where they differ by more than rounding.
    """
    if isinstance(method, LoraMethod):
        round_weights(trained, save_dtype)
        return Delivery(trained, True, {})
    if isinstance(method, QloraMethod):
        round_weights(trained, save_dtype)
        served = _on_original_base(trained, method, base_dir)
        difference = compare(trained, served, compare_on)
        note = f"the adapter is published for the base in its own precision, not in 4 bits; {difference.sentence()}"
        return Delivery(served, True, difference.named("quantization"), (note,))
    if isinstance(method, DoraMethod):
        trained = merge(trained)
    rank = extracted_rank(method)
    if rank is not None:
        return _extracted(trained, rank, base_dir, save_dtype=save_dtype, compare_on=compare_on)
    round_weights(trained, save_dtype, all_weights=True)
    note = f"{method.kind} is published as whole weights in {save_dtype}, which serve as a base model of their own"
    return Delivery(trained, False, {}, (note,))


def merge(trained: Trainable) -> Trainable:
    """The adapter added into the weights of the model it was trained on, in float32 (PEFT's ``merge_and_unload``).

    Raises:
        InvalidArtifactError: a merged weight is not finite.
    """
    try:
        model = trained.model.float().merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InvalidArtifactError(
            f"the adapter cannot be merged: {error}; train with a lower learning rate", code="not_finite"
        ) from error
    return Trainable(model, trained.device, trained.dtype)


def _on_original_base(trained: Trainable, method: QloraMethod, base_dir: Path) -> Trainable:
    shared = {name: getattr(method, name) for name in LowRankMethod.model_fields}
    served = _load_base(trained, LoraMethod(**shared), base_dir)
    _copy_into(served, dict(trained.parameters()))
    return served


def _extracted(
    tuned: Trainable, rank: int, base_dir: Path, *, save_dtype: StoredDtypeName, compare_on: Sequence[Example]
) -> Delivery:
    exact = _load_base(replace(tuned, dtype="float32"), FreezeMethod(trained="."), base_dir)
    layers = list(linear_layers(exact.model))
    extraction = extract_adapter(
        dict(exact.model.named_parameters()),
        dict(tuned.model.named_parameters()),
        layers,
        rank=rank,
        save_dtype=_TORCH_DTYPES[save_dtype],
    )
    del exact
    served = _load_base(tuned, LoraMethod(rank=rank, alpha=rank), base_dir)
    weights: dict[str, torch.Tensor] = {}
    for layer, matrices in extraction.layers.items():
        weights[f"base_model.model.{layer}.lora_A.default.weight"] = matrices.a
        weights[f"base_model.model.{layer}.lora_B.default.weight"] = matrices.b
    _copy_into(served, weights)
    metrics = {
        "extraction.relative_error": extraction.relative_error,
        "extraction.share_outside": extraction.share_outside,
        **{f"extraction.relative_error.{layer}": error for layer, error in extraction.relative_errors.items()},
    }
    difference = compare(tuned, served, compare_on)
    lost = f"{extraction.relative_error:.1%} of the change of the weights (Frobenius norm) is lost"
    note = f"a LoRA adapter of rank {rank} was extracted from the tuned weights: {lost}; {difference.sentence()}"
    return Delivery(served, True, metrics | difference.named("extraction"), (note,))


def _load_base(trained: Trainable, method: Method, base_dir: Path) -> Trainable:
    return load_trainable(
        base_dir, method, dtype=trained.dtype, device=trained.device, seed=0, gradient_checkpointing=False
    )


def _copy_into(served: Trainable, weights: dict[str, torch.Tensor]) -> None:
    parameters = dict(served.parameters())
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
