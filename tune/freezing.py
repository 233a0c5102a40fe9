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


def layers_of(model: Any) -> tuple[str, list[torch.nn.Module]]:
    """The model's layers, the longest list of modules in it, and that list's name; none where there is no list.

    Lists inside a layer, such as its experts, do not count.
    """
    lists: dict[str, torch.nn.ModuleList] = {}
    for name, module in model.named_modules():  # a module comes before those in it
        if isinstance(module, torch.nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    name = max(lists, key=lambda name: len(lists[name]), default="")
    return name, list(lists[name]) if lists else []


def _last_layers(model: Any, number: int) -> tuple[str, ...]:
    """Beginnings of the names of the last layers' weights."""
    name, layers = layers_of(model)
    if not layers:
        raise InvalidRequestError(
            "this base has no list of layers, so last_layers means nothing here; use trained instead",
            param="method.last_layers",
        )
    if number > len(layers):
        raise InvalidRequestError(
            f"last_layers={number}, but this base has {len(layers)} layers", param="method.last_layers"
        )
    return tuple(f"{name}.{index}." for index in range(len(layers) - number, len(layers)))


def _tied_hint(model: Any) -> str:
    if not model.config.get_text_config().tie_word_embeddings:
        return ""
    return " (its output head is its input embedding, and goes by that one's name)"
