"""Training some of a model's weights: which they are, by layer or by name."""

from __future__ import annotations

import re
from typing import Any

import torch

from registry.errors import InvalidRequestError
from tune.methods import FreezeMethod


def train_some_weights(model: Any, method: FreezeMethod) -> None:
    """Freeze all weights of ``model`` but those that ``method`` names; these become float32 in place.

    Raises:
        InvalidRequestError: the model has fewer layers, or no weight of such a name.
    """
    names = [name for name, _ in model.named_parameters()]
    if method.last_layers is not None:
        prefixes = _last_layers(model, method.last_layers)
        chosen = {name for name in names if name.startswith(prefixes)}
    else:
        assert method.trained is not None, method
        chosen = {name for name in names if re.search(method.trained, name)}
        if not chosen:
            raise InvalidRequestError(
                f"trained={method.trained!r} is found in no weight's name of this base{_tied_hint(model)}; they are "
                f"called like {names[len(names) // 2]!r}",
                param="method.trained",
            )
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name in chosen:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _last_layers(model: Any, number: int) -> tuple[str, ...]:
    """Beginnings of the names of the last layers' weights; the layers are the longest list of equal modules."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise InvalidRequestError(
            "this base has no list of layers, so last_layers means nothing here; use trained instead",
            param="method.last_layers",
        )
    name, layers = max(lists, key=lambda named: len(named[1]))
    if number > len(layers):
        raise InvalidRequestError(
            f"last_layers={number}, but this base has {len(layers)} layers", param="method.last_layers"
        )
    return tuple(f"{name}.{index}." for index in range(len(layers) - number, len(layers)))


def _tied_hint(model: Any) -> str:
    if not model.config.get_text_config().tie_word_embeddings:
        return ""
    return " (its output head is its input embedding, and goes by that one's name)"
