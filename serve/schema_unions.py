"""What a schema comes down to through references and unions, and what tells the branches of a union apart.

One part of a schema may be reached from a thousand places, and this runs on the loop that streams everybody's tokens.
So what is known of a part is remembered, and every step is counted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from serve.schema_nodes import SAME_INSTANCE, TYPES, Unresolvable, leading, named_types, resolve

_MOST_BRANCHES = 64
_MOST_STEPS = 500_000
"""Parts walked and values compared; some 0.1 s. A union of 64 objects with a tag takes 2,000."""


class TooManySteps(ValueError):
    """To tell what the schema allows takes too long."""


class Steps:
    """What the check of one schema, or of all tools of a request, may still cost."""

    def __init__(self, most: int = _MOST_STEPS) -> None:
        self._left = most

    def take(self, number: int) -> None:
        """Before they are made.

        Raises:
            TooManySteps: so many are not left.
        """
        self._left -= number
        if self._left < 0:
            raise TooManySteps


def type_of(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
        case None:
            return "null"
    return "array" if isinstance(value, list) else "object"


def is_among(kind: str, types: Iterable[str]) -> bool:
    return kind in types or (kind == "integer" and "number" in types)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A schema that is neither reference nor union."""

    types: frozenset[str]
    values: frozenset[str] | None
    """Its scalars, each in one spelling; ``None``: there are others."""


@dataclass(frozen=True, slots=True)
class _Side:
    """One branch of a union."""

    types: frozenset[str]
    values: frozenset[str] | None
    tags: dict[str, frozenset[str]]
    """Of an object: what its required properties of few values may be."""


class Unions:
    """Of one schema, which must outlive it: parts are known by their ids.

    Every method raises TooManySteps.
    """

    def __init__(self, root: Any, steps: Steps) -> None:
        self._root = root
        self._steps = steps
        self._leaves: dict[int, _Leaf] = {}
        self._tags: dict[int, dict[str, frozenset[str]]] = {}
        self._sides: dict[int, _Side] = {}

    def possible_types(self, schema: Any) -> frozenset[str]:
        """Of the values that ``schema`` allows; all where it does not say."""
        found = self._come_down(schema)
        return _union([self._leaf(leaf).types for leaf in found]) if found else TYPES

    def overlapping(self, branches: list[Any]) -> tuple[int, int] | None:
        """Two of ``branches`` that one value may fit both, as far as can be told. Of more than 64: the last two."""
        if len(branches) > _MOST_BRANCHES:
            return len(branches) - 2, len(branches) - 1
        sides = [self._side(branch) for branch in branches]
        for later, right in enumerate(sides):
            for earlier, left in enumerate(sides[:later]):
                if not self._exclude(left, right):
                    return earlier, later
        return None

    def _come_down(self, schema: Any) -> list[Any] | None:
        """The leaves of ``schema``; ``None``: too many, or not to be followed."""
        found, todo, seen = [], [schema], set()
        while todo:
            current = todo.pop()
            if id(current) in seen:
                continue
            seen.add(id(current))
            if len(seen) > _MOST_BRANCHES * 2:
                return None
            kind = leading(current) if isinstance(current, dict) else ""
            if kind == "$ref":
                reference = current["$ref"]
                self._steps.take(1 + (reference.count("/") if isinstance(reference, str) else 0))
                try:
                    todo.append(resolve(self._root, reference).schema)
                except Unresolvable:
                    return None
            elif kind in SAME_INSTANCE:
                if not isinstance(current[kind], list):
                    return None
                self._steps.take(1 + len(current[kind]))
                todo.extend(current[kind])
            else:
                self._steps.take(1)
                found.append(current)
        return found

    def _leaf(self, leaf: Any) -> _Leaf:
        if id(leaf) not in self._leaves:
            values = _values(leaf) if isinstance(leaf, dict) else None
            if values is not None:
                self._steps.take(len(values))
                are_scalars = not any(isinstance(value, dict | list) for value in values)
                spelled = frozenset(map(_spelled, values)) if are_scalars else None
                self._leaves[id(leaf)] = _Leaf(frozenset(map(type_of, values)), spelled)
            elif isinstance(leaf, dict) and "type" in leaf:
                self._leaves[id(leaf)] = _Leaf(frozenset(named_types(leaf)), None)
            else:
                self._leaves[id(leaf)] = _Leaf(TYPES, None)
        return self._leaves[id(leaf)]

    def _finite(self, found: list[Any] | None) -> frozenset[str] | None:
        """The scalars that the leaves allow together."""
        values = [self._leaf(leaf).values for leaf in found or ()]
        told = [each for each in values if each is not None]
        return self._together(told) if told and len(told) == len(values) else None

    def _side(self, branch: Any) -> _Side:
        if isinstance(branch, dict) and "$ref" in branch:
            with contextlib.suppress(Unresolvable):
                branch = resolve(self._root, branch["$ref"]).schema
        if id(branch) not in self._sides:
            found = self._come_down(branch) or []
            types = _union([self._leaf(leaf).types for leaf in found]) if found else TYPES
            tags = [self._tags_of(leaf) for leaf in found]
            self._steps.take(sum(map(len, tags)))
            shared = set.intersection(*(set(each) for each in tags)) if tags else set()
            self._sides[id(branch)] = _Side(
                frozenset("number" if name == "integer" else name for name in types),
                self._finite(found),
                {name: self._together([each[name] for each in tags]) for name in shared},
            )
        return self._sides[id(branch)]

    def _tags_of(self, leaf: Any) -> dict[str, frozenset[str]]:
        if id(leaf) not in self._tags:
            self._tags[id(leaf)] = dict(self._read_tags(leaf))
        return self._tags[id(leaf)]

    def _read_tags(self, leaf: Any) -> Iterable[tuple[str, frozenset[str]]]:
        required = leaf.get("required") if isinstance(leaf, dict) and named_types(leaf) == ["object"] else None
        properties = leaf.get("properties") if isinstance(required, list) else None
        if not isinstance(required, list) or not isinstance(properties, dict):
            return
        self._steps.take(len(required))
        for name in {name for name in required if isinstance(name, str)} & properties.keys():
            values = self._finite(self._come_down(properties[name]))
            if values is not None:
                yield name, values

    def _exclude(self, left: _Side, right: _Side) -> bool:
        """Whether no value fits both."""
        self._steps.take(1 + min(len(left.tags), len(right.tags)))
        return (
            left.types.isdisjoint(right.types)
            or (left.values is not None and right.values is not None and self._are_apart(left.values, right.values))
            or any(self._are_apart(left.tags[name], right.tags[name]) for name in left.tags.keys() & right.tags.keys())
        )

    def _are_apart(self, left: frozenset[str], right: frozenset[str]) -> bool:
        self._steps.take(min(len(left), len(right)))
        return left.isdisjoint(right)

    def _together(self, sets: list[frozenset[str]]) -> frozenset[str]:
        if len(sets) > 1:
            self._steps.take(sum(map(len, sets)))
        return _union(sets)


def _union(sets: list[frozenset[str]]) -> frozenset[str]:
    return sets[0] if len(sets) == 1 else frozenset().union(*sets)


def _spelled(value: Any) -> str:
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _values(leaf: dict[str, Any]) -> list[Any] | None:
    if "const" in leaf:
        return [leaf["const"]]
    return leaf["enum"] if isinstance(leaf.get("enum"), list) else None
