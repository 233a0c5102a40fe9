"""Checks of the parts of a request, each told of by its place: ``messages.0.content``.

Raises:
    InvalidRequestError: in all checks, where a part is not what it must be; ``param`` is its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from registry import errors

_SHOWN_CHARACTERS = 100
_JSON = json.JSONEncoder()


def entries(body: Mapping[str, Any], name: str, within: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a list of objects with their places. What is no list is left to vLLM's own models."""
    prefix = f"{within}." if within else ""
    value = body.get(name)
    for number, entry in enumerate(value if isinstance(value, list) else []):
        place = f"{prefix}{name}.{number}"
        if not isinstance(entry, dict):
            raise errors.InvalidRequestError(f"{place} must be an object, got {shown(entry)}.", param=place)
        yield place, entry


def check_is_object(place: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise errors.InvalidRequestError(f"{place} must be an object, got {shown(value)}.", param=place)


def drop_nulls(value: dict[str, Any], *, but: str = "") -> None:
    """A key with null asks for nothing, whatever its name. ``but``: one that stays."""
    drop_keys(value, *(name for name, given in value.items() if given is None and name != but))


def drop_keys(value: dict[str, Any], *names: str) -> None:
    for name in names:
        value.pop(name, None)


def check_keys(place: str, value: Any, allowed: set[str]) -> None:
    if isinstance(value, dict) and (unknown := sorted(value.keys() - allowed)):
        raise errors.InvalidRequestError(
            f"{place} has the unknown key {unknown[0][:100]!r}; allowed are {', '.join(sorted(allowed))}.",
            param=f"{place}.{unknown[0][:100]}",
            code="unknown_field",
        )


def require_a_name(place: str, value: Any) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise errors.InvalidRequestError(f"{place} must be an object with a name.", param=place)


def require_a_text(place: str, value: Any) -> None:
    if not isinstance(value, str):
        raise errors.InvalidRequestError(f"{place} must be a text, got {shown(value)}.", param=place)


def shown(value: Any) -> str:
    """The first 100 characters of its JSON. Written in pieces, so that of megabytes no more than these are."""
    text = ""
    for piece in _JSON.iterencode(value):
        text += piece
        if len(text) >= _SHOWN_CHARACTERS:
            break
    return text[:_SHOWN_CHARACTERS]
