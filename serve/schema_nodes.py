"""The parts of a JSON schema: where each stands, and what it leads to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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


def named_types(schema: dict[str, Any]) -> list[str]:
    given = schema.get("type", [])
    return [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]


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


def on_a_circle(edges: list[tuple[Node, Node]]) -> Node | None:
    """The first node from which ``edges`` lead into a circle: what is left after all loose ends are taken off."""
    ends = {id(child.schema) for _, child in edges} - {id(node.schema) for node, _ in edges}
    leading_to: dict[int, list[Node]] = {}
    num_ahead: dict[int, int] = {}
    for node, child in edges:
        leading_to.setdefault(id(child.schema), []).append(node)
        num_ahead[id(node.schema)] = num_ahead.get(id(node.schema), 0) + 1
    loose = list(ends)
    while loose:
        for node in leading_to.get(loose.pop(), ()):
            num_ahead[id(node.schema)] -= 1
            if not num_ahead[id(node.schema)]:
                loose.append(id(node.schema))
    return next((node for node, _ in edges if num_ahead[id(node.schema)]), None)
