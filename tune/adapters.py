"""Low-rank adapters on a loaded model: which layers get one, of which rank, and PEFT's layers in their place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, Literal, TypeAlias
from unittest.mock import patch

import torch

from registry.errors import InvalidRequestError
from tune.methods import AdapterMethod, DoraMethod

Model: TypeAlias = Any
"""A transformers causal language model, possibly wrapped by PEFT; neither ships types that mypy could follow."""


def attach_adapter(model: Model, method: AdapterMethod, *, seed: int) -> tuple[Model, tuple[str, ...]]:
    """Wrap ``model`` in PEFT's and freeze its own weights; also the leaf names of the adapted layers.

    Adapter weights are float32 whatever the model's dtype, initialised from ``seed``.

    Raises:
        InvalidRequestError: a target names no linear layer of the model, or a pattern no target.
    """
    from peft import LoraConfig, get_peft_model  # several seconds; training of whole weights does not need it

    targets = _resolve_targets(model, method.target_modules)
    _check_patterns_are_used(model, method, targets)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.scaled_alpha,
        lora_dropout=method.dropout,
        target_modules=list(targets),
        use_rslora=method.use_rslora,
        use_dora=isinstance(method, DoraMethod),
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        init_lora_weights=True if method.init == "default" else method.init,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with _no_gptq_layers():
        return get_peft_model(model, config, autocast_adapter_dtype=True), targets


def resolved_patterns(model: Model) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha patterns of a PEFT model by the full names of its layers.

    The keys a person writes are regular expressions. Serving takes names only, because an expression from a stranger
    can take for ever to match; so an adapter is stored with one key for each layer that differs.
    """
    config = model.peft_config["default"]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, module in model.named_modules():
        if "default" not in getattr(module, "r", {}):
            continue
        layer = name.removeprefix("base_model.model.")
        if module.r["default"] != config.r:
            ranks[layer] = module.r["default"]
        if module.lora_alpha["default"] != config.lora_alpha:
            alphas[layer] = module.lora_alpha["default"]
    return ranks, alphas


def linear_layers(model: Model) -> Iterator[str]:
    """Full names of the linear layers, without the output head: vLLM would have to hold it for each adapter."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield name


def _resolve_targets(model: Model, asked: Literal["all-linear"] | Sequence[str]) -> tuple[str, ...]:
    """Leaf names of linear layers, sorted."""
    leaves = {name.rsplit(".", 1)[-1] for name in linear_layers(model)}
    if asked == "all-linear":
        return tuple(sorted(leaves))
    unknown = sorted(set(asked) - leaves)
    if unknown:
        raise InvalidRequestError(
            f"target_modules {unknown} name no linear layer of this base; it has {sorted(leaves)}",
            param="method.target_modules",
        )
    return tuple(sorted(set(asked)))


def _check_patterns_are_used(model: Model, method: AdapterMethod, targets: Sequence[str]) -> None:
    layers = [name for name in linear_layers(model) if name.rsplit(".", 1)[-1] in targets]
    patterns: dict[str, Mapping[str, int]] = {
        "rank_pattern": method.rank_pattern,
        "alpha_pattern": method.alpha_pattern,
    }
    for field, given in patterns.items():
        for key in given:
            # PEFT's rule (peft/utils/other.py, get_pattern_key)
            if not any(re.match(rf"(.*\.)?({key})$", layer) for layer in layers):
                raise InvalidRequestError(
                    f"{field} has the key {key!r}, which matches no adapted layer; layers are called like "
                    f"{layers[0]!r}, and a key must match such a name from a dot to its end",
                    param=f"method.{field}",
                )


@contextmanager
def _no_gptq_layers() -> Iterator[None]:
    """Keep PEFT from importing gptqmodel to ask whether our plain layers are quantised by it.

    The import takes 5 s, prints a banner to stdout and changes CUDA's environment variables.
    """
    with ExitStack() as stack:
        for name in ("tuners.lora.gptq", "tuners.lora.awq", "utils.other", "utils.quantization_utils"):
            asking = import_module(f"peft.{name}")
            stack.enter_context(patch.object(asking, "is_gptqmodel_available", lambda: False))
        yield
