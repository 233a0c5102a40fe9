"""From what a person wrote to a recipe: YAML or JSON, with errors that name the field."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from registry.errors import InvalidRequestError, NotFoundError
from tune.recipe import Recipe


def parse_recipe(given: object) -> Recipe:
    """Check an already decoded recipe (JSON of the API, YAML of a file).

    Raises:
        InvalidRequestError: naming the field in ``param``; unknown keys come with the nearest known one.
    """
    if not isinstance(given, dict):
        raise InvalidRequestError(
            f"a recipe must be a mapping with at least name, base_model and stages, got {type(given).__name__}"
        )
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = _field_path(first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] in ("value_error", "missing") else f", got {_shortened(first['input'])}"
        raise InvalidRequestError(
            f"recipe{': ' + where if where else ''}: {reason}{got}",
            code="invalid_recipe",
            param=where or None,
        ) from error


def load_recipe(path: Path) -> Recipe:
    """Read a recipe in YAML, or in JSON, which is YAML too.

    Relative data paths stay as written; pass ``path.parent`` to ``tune.session.run``.

    Raises:
        NotFoundError: there is no such file.
        InvalidRequestError: not UTF-8, not YAML, a key given twice, or not a valid recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFoundError(f"there is no recipe file at {path}", param="recipe") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        return parse_recipe(yaml.load(text, Loader=_UniqueKeyLoader))  # noqa: S506 - a SafeLoader, see its class
    except yaml.YAMLError as error:
        raise InvalidRequestError(f"{path} is not valid YAML: {error}", code="invalid_recipe") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a recipe must not lose settings that way."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _field_path(location: tuple[int | str, ...]) -> str:
    """``("stages", 0, "data")`` -> ``stages[0].data``, without the tags pydantic adds for unions."""
    tags = {"lora", "qlora", "dora", "freeze", "full", "tuple[str, ...]", "literal['all-linear']"}
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in tags:
            path += f".{part}" if path else part
    return path


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
