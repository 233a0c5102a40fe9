"""Schemas that xgrammar 0.2.8 takes for one another.

It reads equal schemas once, and what is equal it asks of a text from which every ``title``, ``description`` and the
like is left out (cpp/json_schema_converter.cc, ``ComputeCacheKey``), also where that is the name of a property or a key
within a const. Of two objects that differ only in what their property ``title`` may be, the second gets the first
one's.
"""

from __future__ import annotations

from typing import Any

from serve.schema_nodes import LISTS, MAPS, SINGLE, Node, named_types

ANNOTATIONS_SKIPPED = frozenset(
    ("title", "default", "description", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema")
)
_ROLES = (
    dict.fromkeys(LISTS, "list")
    | dict.fromkeys(SINGLE, "schema")
    | dict.fromkeys((*MAPS, "$defs", "definitions"), "map")
)
"""What the value of a keyword is: a schema, a list or a map of them; anything else is taken as it stands."""


class Twins:
    """Remembers the schemas of one request."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        self._keys: dict[tuple[int, str], tuple[int, int]] = {}
        self._first: dict[int, tuple[int, str, Node]] = {}
        self._kept: list[Any] = []
        """So that no id is given out twice."""

    def other(self, place: str, node: Node) -> str | None:
        """Where a schema was seen before that xgrammar takes ``node`` for, though it says something else.

        ``place``: of the whole schema, in the request. A list of types names each at most once.
        """
        types = named_types(node.schema) if isinstance(node.schema, dict) else []
        forms = [node.schema]
        if isinstance(node.schema, dict) and isinstance(node.schema.get("type"), list):
            forms += [{**node.schema, "type": name} for name in types]  # it is read once for each type
            self._kept.extend(forms)
        for form in forms:
            cached, meaning = self._key(form, "schema")
            first_meaning, first_place, first = self._first.setdefault(cached, (meaning, place, node))
            if first_meaning != meaning:
                return first.pointer if first_place == place else f"{first.pointer} in {first_place}"
        return None

    def is_same(self, left: Any, right: Any) -> bool:
        return self._key(left, "schema")[1] == self._key(right, "schema")[1]

    def _key(self, value: Any, role: str) -> tuple[int, int]:
        """Numbers of what xgrammar compares, and of what is meant. ``value`` is no deeper than a request may be."""
        known = (id(value), role)
        if isinstance(value, dict | list) and known in self._keys:
            return self._keys[known]
        if isinstance(value, dict):
            inner = {name: self._key(each, _role(role, name)) for name, each in value.items()}
            cached = frozenset((name, key[0]) for name, key in inner.items() if name not in ANNOTATIONS_SKIPPED)
            is_schema = role == "schema"
            meant = frozenset(
                (name, key[1]) for name, key in inner.items() if not (is_schema and name in ANNOTATIONS_SKIPPED)
            )
            key = self._number(("object", cached)), self._number(("object", meant))
        elif isinstance(value, list):
            keys = [self._key(each, "schema" if role == "list" else "value") for each in value]
            key = self._number(tuple(each[0] for each in keys)), self._number(tuple(each[1] for each in keys))
        else:
            number = self._number((type(value).__name__, value))
            return number, number
        self._keys[known] = key
        return key

    def _number(self, content: object) -> int:
        return self._numbers.setdefault(content, len(self._numbers))


def _role(role: str, name: str) -> str:
    if role == "map":
        return "schema"
    if role != "schema":
        return "value"
    return _ROLES.get(name, "value")
