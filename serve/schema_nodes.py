"""The parts of a JSON schema: where each stands, what it leads to, and what the instances of a union have in common."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MOST_BRANCHES = 64
TYPES = frozenset(("null", "boolean", "object", "array", "number", "string", "integer"))
SAME_INSTANCE = ("anyOf", "oneOf", "allOf")
"""Their branches speak of the value that the schema itself speaks of."""
MAPS = ("properties", "patternProperties")
SINGLE = ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "propertyNames")
LISTS = (*SAME_INSTANCE, "prefixItems")


@dataclass(frozen=True, slots=True)
class Node:
    """``schema`` is whatever stands there, a schema or not."""

    schema: Any
    step: str = "#"
    parent: Node | None = None

    @property
    def pointer(self) -> str:
        """As RFC 6901 writes it, cut to what fits into a message. Made only when it is needed: names may be long."""
        steps, node = [], self
        while node.parent is not None:
            steps.append(node.step[:100].replace("~", "~0").replace("/", "~1"))
            node = node.parent
        return "/".join([node.step, *reversed(steps)])[:400]

    @property
    def is_root(self) -> bool:
        return self.parent is None and self.step == "#"

    def child(self, *keys: str | int) -> Node:
        node = self
        for key in keys:
            node = Node(node.schema[key], str(key), node)
        return node


class Unresolvable(ValueError):
    """A reference that xgrammar takes for "anything", or that leads nowhere."""


def resolve(root: Any, reference: Any) -> Node:
    """What ``reference`` points to. xgrammar follows plain pointers through objects only, and decodes no escapes.

    Raises:
        Unresolvable: it cannot be followed; the text says why.
    """
    if reference == "#":
        return Node(root)
    if not isinstance(reference, str) or not reference.startswith("#/"):
        raise Unresolvable("only references within the schema are followed, as in #/$defs/name")
    schema, names = root, reference[2:].split("/")
    for name in names:
        if not name or "~" in name or "%" in name:
            raise Unresolvable("a name in it is empty or has ~ or %, which are not decoded; rename the definition")
        if not isinstance(schema, dict) or name not in schema:
            raise Unresolvable(f"there is no {name[:100]!r}")
        schema = schema[name]
    return Node(schema, reference[:400])


def leading(schema: dict[str, Any]) -> str:
    """The one keyword by which xgrammar reads ``schema``; with some of them it reads no other."""
    for name in ("$ref", "const", "enum", *SAME_INSTANCE, "type"):
        if name in schema:
            return name
    if schema.keys() & {"properties", "additionalProperties", "unevaluatedProperties"}:
        return "properties"
    return "items" if schema.keys() & {"items", "prefixItems", "unevaluatedItems"} else ""


def leaves(root: Any, schema: Any) -> list[Any] | None:
    """What ``schema`` comes down to through references and unions; ``None``: too much, or not to be followed."""
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
            try:
                todo.append(resolve(root, current["$ref"]).schema)
            except Unresolvable:
                return None
        elif kind in SAME_INSTANCE:
            if not isinstance(current[kind], list):
                return None
            todo.extend(current[kind])
        else:
            found.append(current)
    return found


def possible_types(root: Any, schema: Any) -> set[str]:
    """Of the values that ``schema`` allows; all where it does not say."""
    types: set[str] = set()
    for leaf in leaves(root, schema) or [{}]:
        if isinstance(leaf, dict) and (values := _values(leaf)) is not None:
            types |= {type_of(value) for value in values}
        elif isinstance(leaf, dict) and "type" in leaf:
            types |= set(named_types(leaf))
        else:
            types |= TYPES
    return types


def named_types(schema: dict[str, Any]) -> list[str]:
    given = schema.get("type", [])
    return [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]


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


def is_among(kind: str, types: set[str] | frozenset[str]) -> bool:
    return kind in types or (kind == "integer" and "number" in types)


class Unions:
    """What is known of the branches of one schema's unions; each is looked at once."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._sides: dict[int, _Side] = {}

    def overlapping(self, branches: list[Any]) -> tuple[int, int] | None:
        """Two of ``branches`` that one value may fit both, as far as can be told. Of more than 64: the last two."""
        if len(branches) > _MOST_BRANCHES:
            return len(branches) - 2, len(branches) - 1
        sides = [self._side(branch) for branch in branches]
        for later, right in enumerate(sides):
            for earlier, left in enumerate(sides[:later]):
                if not _exclude(left, right):
                    return earlier, later
        return None

    def _side(self, branch: Any) -> _Side:
        if isinstance(branch, dict) and "$ref" in branch:
            with contextlib.suppress(Unresolvable):
                branch = resolve(self._root, branch["$ref"]).schema
        if id(branch) not in self._sides:
            self._sides[id(branch)] = _side(self._root, branch)
        return self._sides[id(branch)]


@dataclass(frozen=True, slots=True)
class _Side:
    types: set[str]
    values: set[str] | None
    tags: dict[str, set[str]]
    """Of an object: what its required properties of few values may be."""


def _side(root: Any, branch: Any) -> _Side:
    types = {"number" if name == "integer" else name for name in possible_types(root, branch)}
    found = leaves(root, branch) or []
    tags: list[dict[str, set[str]]] = []
    for leaf in found:
        required = leaf.get("required") if isinstance(leaf, dict) and named_types(leaf) == ["object"] else None
        properties = leaf.get("properties") if isinstance(required, list) else None
        tags.append({})
        for name, schema in properties.items() if isinstance(properties, dict) else ():
            values = _finite(leaves(root, schema) or [])
            if values is not None and isinstance(required, list) and name in required:
                tags[-1][name] = values
    shared = set.intersection(*(set(each) for each in tags)) if tags else set()
    return _Side(types, _finite(found), {name: set().union(*(each[name] for each in tags)) for name in shared})


def _exclude(left: _Side, right: _Side) -> bool:
    return (
        not left.types & right.types
        or (left.values is not None and right.values is not None and not left.values & right.values)
        or any(not left.tags[name] & right.tags[name] for name in left.tags.keys() & right.tags.keys())
    )


def _finite(found: list[Any]) -> set[str] | None:
    """The scalars that ``found`` allow, each in one spelling; ``None``: there are others."""
    spelled: set[str] = set()
    for leaf in found:
        values = _values(leaf) if isinstance(leaf, dict) else None
        if values is None or any(isinstance(value, dict | list) for value in values):
            return None
        spelled |= {json.dumps(int(v) if isinstance(v, float) and v.is_integer() else v) for v in values}
    return spelled if found else None


def _values(leaf: dict[str, Any]) -> list[Any] | None:
    if "const" in leaf:
        return [leaf["const"]]
    return leaf["enum"] if isinstance(leaf.get("enum"), list) else None


def children(node: Node) -> Iterator[tuple[str, Node]]:
    """The schemas within ``node`` by the keyword that they stand under; only those that xgrammar reads."""
    schema, kind = node.schema, leading(node.schema)
    if kind in SAME_INSTANCE:
        names: tuple[str, ...] = (kind,)
    elif kind in ("type", "properties", "items"):
        names = (*MAPS, *SINGLE, "prefixItems")
    else:
        return
    for name in names:
        value = schema.get(name)
        if name in SINGLE and name in schema and not (value is False and name != "propertyNames"):
            yield name, node.child(name)
        elif name in MAPS and isinstance(value, dict):
            yield from ((name, node.child(name, key)) for key in value)
        elif name in LISTS and isinstance(value, list):
            yield from ((name, node.child(name, index)) for index in range(len(value)))
