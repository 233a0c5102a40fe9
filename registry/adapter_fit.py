"""Whether an adapter's modules are modules of one base model, by name and shape.

vLLM skips weights for modules that it does not have, and serves the rest. So a module that the base does not have is
refused. Of a base that is known by its weights only, a module is looked for by its name from the layer's number on,
because models and their files name the outer parts differently (``model.language_model.layers`` and
``language_model.model.layers``). Where several modules go by that name, the shape of one of them must fit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from registry.adapter_config import AdapterConfig
from registry.adapter_shapes import BaseShapes, ModuleShape
from registry.errors import InvalidArtifactError
from registry.names import shown

_LAYER = re.compile(r"\.layers\.([0-9]+)\.", re.ASCII)
_ALL_LINEAR = "all-linear"
_EMBEDDINGS = ("embed_tokens", "lm_head")
"""PEFT's shorthand means neither of the two (tuners_utils.py: _maybe_include_all_linear_layers)."""
WITHOUT_ADAPTED_EMBEDDINGS = frozenset({"mistral", "qwen2"})
"""Model types whose classes in vLLM 0.32 have no ``embedding_modules``; it takes no adapter on them there."""


def check_fit(modules: Mapping[str, ModuleShape], config: AdapterConfig, base: BaseShapes) -> list[str]:
    """Compare the adapter's modules with the base model's; returns what could not be checked, one sentence each.

    Raises:
        InvalidArtifactError: the base lacks a module, or one has another shape (``base_mismatch``); or the adapter
            lacks one that its configuration names (``missing_modules``); or the engine takes none on the base's
            embeddings (``unsupported_embeddings``).
    """
    if base.model_type in WITHOUT_ADAPTED_EMBEDDINGS:
        _refuse_embeddings(modules, base.model_type)
    if not base.modules and not base.packed:
        return ["The base model's weights name no modules, so the adapter's were not compared with them."]
    named_like = _by_inner_name(base)
    unmeasured = 0
    for module, shape in modules.items():
        names = [module] if module in base.modules or module in base.packed else []
        if not names and not base.is_complete:
            names = named_like.get(_inner_name(module), [])
        if not names:
            raise _base_mismatch(f"the base model has no module {shown(module)}")
        if any(name in base.packed for name in names):
            unmeasured += 1
        elif shape not in [base.modules[name] for name in names]:
            real = base.modules[names[0]]
            raise _base_mismatch(
                f"its module {shown(module)} goes from {shape.in_features} to {shape.out_features} features, the base "
                f"model's from {real.in_features} to {real.out_features}"
            )
    notes: list[str] = []
    if unmeasured:
        notes.append(
            f"{unmeasured} of {len(modules)} modules were compared with the base model by name only, because its "
            "weights are quantised, which hides their shapes."
        )
    if (obstacle := _why_targets_are_unknown(config, base)) is not None:
        notes.append(f"Whether modules are missing was not checked, because {obstacle}.")
    else:
        _check_none_missing(modules, config, base)
    return notes


def _refuse_embeddings(modules: Iterable[str], model_type: str) -> None:
    for module in modules:
        if _is_named(module, _EMBEDDINGS):
            raise InvalidArtifactError(
                f"The adapter changes {shown(module)}, and the engine takes no adapters on the embeddings or the head "
                f"of a {model_type!r} model. Train it without them, or merge it with peft and serve the "
                "result as a base.",
                code="unsupported_embeddings",
            )


def _by_inner_name(base: BaseShapes) -> Mapping[str, list[str]]:
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name in [*base.modules, *sorted(base.packed)]:
        names[_inner_name(name)].append(name)
    return names


def _inner_name(module: str) -> str:
    """From the layer's number and the word before it on; without a number, the last word."""
    words = module.split(".")
    number = next((index for index, word in enumerate(words) if word.isdecimal()), None)
    return words[-1] if number is None else ".".join(words[max(0, number - 1) :])


def _why_targets_are_unknown(config: AdapterConfig, base: BaseShapes) -> str | None:
    """Expressions come from strangers and are never evaluated here; and weights do not tell which of their modules the
    adapter's maker had in front of it."""
    if not base.is_complete:
        return f"a {base.model_type!r} base is known by its weights only"
    if isinstance(config.target_modules, str) and config.target_modules.lower() != _ALL_LINEAR:
        return "target_modules is a regular expression"
    if isinstance(config.exclude_modules, str):
        return "exclude_modules is a regular expression"
    return None


def _check_none_missing(present: Mapping[str, ModuleShape], config: AdapterConfig, base: BaseShapes) -> None:
    for module in base.modules:
        if _is_target(module, config) and module not in present:
            raise InvalidArtifactError(
                f"The adapter has no weights for {shown(module)}, which its target_modules name. The file is cut or "
                "belongs to a smaller model; save the adapter again.",
                code="missing_modules",
            )


def _is_target(module: str, config: AdapterConfig) -> bool:
    """PEFT takes a name as the end of a module's name (tuners_utils.py: check_target_module_exists)."""
    if _is_named(module, config.exclude_modules):
        return False
    if isinstance(config.target_modules, str):
        return not _is_named(module, _EMBEDDINGS)
    layer = _LAYER.search(module)
    if config.layers_to_transform is not None and (
        layer is None or int(layer.group(1)) not in config.layers_to_transform
    ):
        return False
    return _is_named(module, config.target_modules)


def _is_named(module: str, names: tuple[str, ...] | str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _base_mismatch(what: str) -> InvalidArtifactError:
    return InvalidArtifactError(
        f"The adapter does not belong to this base model: {what}. Name the base model it was trained on.",
        code="base_mismatch",
    )
