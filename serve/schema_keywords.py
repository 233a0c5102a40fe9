"""Which JSON schemas the engine holds an answer to in full.

xgrammar 0.2.8, which writes the grammar, reads one keyword of a schema (:func:`serve.schema_nodes.leading`) and the few
that go with it, and drops the rest without a word (cpp/json_schema_converter.cc, ``SchemaParser``). Here what it would
drop is refused by keyword and place. It writes no property and no item that is not named, unless it is told that there
may be others; what it leaves out in this way is still within the schema.

Annotations may stand everywhere, and so may keywords that no draft of JSON Schema defines: those bind nothing.
Of ``format`` the form of the text is held (a date has its digits and dashes), which is more than JSON Schema demands.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import isfinite
from typing import Any

from registry import errors
from serve import schema_patterns
from serve.schema_bounds import BOUNDS, DECIMALS, has_a_decimal
from serve.schema_nodes import (
    SAME_INSTANCE,
    TYPES,
    Node,
    Unresolvable,
    children,
    leading,
    named_types,
    on_a_circle,
    resolve,
)
from serve.schema_twins import Twins
from serve.schema_unions import Steps, TooManySteps, Unions, is_among, type_of

_NEVER = {
    "not": "list what is allowed with enum or anyOf",
    "if": "write one branch of an anyOf for each case",
    "then": "write one branch of an anyOf for each case",
    "else": "write one branch of an anyOf for each case",
    "dependentRequired": "write one branch of an anyOf for each case",
    "dependentSchemas": "write one branch of an anyOf for each case",
    "dependencies": "write one branch of an anyOf for each case",
    "multipleOf": "list the values with enum, leave it out or check the answer yourself",
    "uniqueItems": "leave it out or check the answer yourself",
    "contains": "leave it out or check the answer yourself",
    "minContains": "leave it out or check the answer yourself",
    "maxContains": "leave it out or check the answer yourself",
    "additionalItems": "use prefixItems and items",
    "$dynamicRef": "use $ref and $defs",
    "$recursiveRef": "use $ref and $defs",
}
_OF_TYPE = {
    "object": ("required", "properties", "patternProperties", "propertyNames", "additionalProperties",
               "unevaluatedProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "unevaluatedItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": BOUNDS,
}  # fmt: skip
_BINDING = {"type", "$ref", "const", "enum", *SAME_INSTANCE, *(name for names in _OF_TYPE.values() for name in names)}
_EXCLUSIVE = (
    ("patternProperties", "properties"),
    ("propertyNames", "properties"),
    ("propertyNames", "patternProperties"),
    ("propertyNames", "unevaluatedProperties"),
)
_ANYTHING: dict[str, Any] = {}
_FORMATS = ("date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference",
            "uri-template")  # fmt: skip
"""xgrammar's, without email and the two JSON pointers: with those it writes text that is not JSON."""


def check(place: str, schema: Any) -> None:
    """Whether each answer that the engine can write to ``schema`` is valid by it. ``schema`` is of bounded depth.

    Raises:
        InvalidRequestError: some keyword would not be held, the schema is none, or to tell takes too long; ``param`` is
            ``place``.
    """
    _Check(place, schema, Twins(), Steps(), is_tool=False).run()


def check_tools(parameters: Iterable[tuple[str, Any]]) -> None:
    """:func:`check` for the parameters of the strict tools of one request, of which one schema is made.

    Raises:
        InvalidRequestError: as above.
    """
    twins, steps = Twins(), Steps()
    for place, schema in parameters:
        _Check(place, schema, twins, steps, is_tool=True).run()


class _Check:
    def __init__(self, place: str, root: Any, twins: Twins, steps: Steps, *, is_tool: bool) -> None:
        self._place = place
        self._root = root
        self._twins = twins
        self._unions = Unions(root, steps)
        self._is_tool = is_tool

    def run(self) -> None:
        try:
            self._check_all()
        except TooManySteps:
            raise errors.InvalidRequestError(
                "The schema takes too long to check: it refers to large parts too often, or has too many values to "
                "compare in its unions. Give the branches of each oneOf one required property with a const, or write "
                "anyOf.",
                param=self._place,
                code="schema_too_large",
            ) from None

    def _check_all(self) -> None:
        todo = [(Node(self._root), "")]
        seen = {(id(self._root), False)}
        same_instance: list[tuple[Node, Node]] = []
        while todo:
            node, under = todo.pop()
            self._check_node(node, under)
            if node.schema is True:
                continue
            ahead = [(child, name) for name, child in children(node)]
            if leading(node.schema) == "$ref":
                ahead.append((self._resolve(node), "$ref"))
            for child, name in ahead:
                if name in ("$ref", *SAME_INSTANCE):
                    same_instance.append((node, child))
                key = (id(child.schema), name == "propertyNames")
                if key not in seen or isinstance(child.schema, bool):
                    seen.add(key)
                    todo.append((child, name))
        if (circular := on_a_circle(same_instance)) is not None:
            raise self._refusal(circular, leading(circular.schema), "it leads back to itself, with no value between")

    def _resolve(self, node: Node) -> Node:
        reference = node.schema["$ref"]
        if self._is_tool and not str(reference).startswith("#/$defs/"):
            # vLLM puts the parameters into a larger schema, and takes only $defs to the root.
            raise self._refusal(node, "$ref", "parameters may refer to #/$defs/name only", value=reference)
        try:
            return resolve(self._root, reference)
        except Unresolvable as error:
            raise self._refusal(node, "$ref", f"{error}", value=reference) from None

    def _check_node(self, node: Node, under: str) -> None:
        schema = node.schema
        if schema is False:
            raise self._malformed(node, "is false, which nothing satisfies: leave the branch or property out")
        if schema is True and under not in ("propertyNames", "prefixItems"):
            return
        if not isinstance(schema, dict):
            raise self._malformed(node, "must be a JSON schema, an object")
        for name, advice in _NEVER.items():
            if name in schema:
                raise self._refusal(node, name, advice)
        if "$id" in schema and not node.is_root:
            raise self._refusal(node, "$id", "references are followed from the root; leave it out")
        self._check_shapes(node)
        if (twin := self._twins.other(self._place, node)) is not None:
            raise self._malformed(
                node,
                f"is taken by the engine for the schema at {twin}: they differ only in a property or key named as an "
                "annotation is (title, description, default, ...). Rename it in one of the two",
            )
        if under == "propertyNames":
            self._check_names(node)
        kind = leading(schema)
        if kind in ("$ref", "const", "enum", *SAME_INSTANCE):
            self._check_lone(node, kind)
        elif kind:
            self._check_typed(node, named_types(schema) or ["object" if kind == "properties" else "array"])
        elif under != "propertyNames" and (dropped := [name for name in schema if name in _BINDING]):
            raise self._refusal(node, dropped[0], "it needs a type beside it; name the type")
        elif under == "propertyNames":
            self._check_string(node)

    def _check_shapes(self, node: Node) -> None:
        """Of what is looked into later; the rest is xgrammar's to refuse."""
        schema = node.schema
        for name in ("properties", "patternProperties"):
            if not isinstance(schema.get(name, {}), dict):
                raise self._malformed(node, f"has {name} that is no object")
        for name in (*SAME_INSTANCE, "enum"):
            if name in schema and (not isinstance(schema[name], list) or not schema[name]):
                raise self._malformed(node, f"has {name} that is no list of at least one entry")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self._malformed(node, "has required that is no list of names")
        if not isinstance(schema.get("prefixItems", []), list):
            raise self._malformed(node, "has prefixItems that is no list")
        types = schema.get("type", "null")
        types = types if isinstance(types, list) else [types]
        if not types or not all(isinstance(name, str) and name in TYPES for name in types):
            raise self._malformed(node, f"has a type that is not among {', '.join(sorted(TYPES))}")
        if len(types) != len(set(types)):
            raise self._malformed(node, "has a type that names one twice")

    def _check_lone(self, node: Node, kind: str) -> None:
        """A schema of which xgrammar reads ``kind`` alone: what stands beside it must say nothing more."""
        schema = node.schema
        values = [schema["const"]] if kind == "const" else schema["enum"] if kind == "enum" else None
        for name in schema:
            if name == kind or name not in _BINDING:
                continue
            if name == "type":
                types = set(named_types(schema))
                if kind == "$ref":
                    self._resolve(node)  # first says which reference leads nowhere
                # Of a reference or union these are the types without the one beside it.
                told = {*map(type_of, values)} if values is not None else self._unions.possible_types(schema)
                if all(is_among(each, types) for each in told):
                    continue
                advice = f"{kind} allows {', '.join(sorted(told - types))} too; let both say the same"
            elif values is not None and name == "enum" and _spelled(values[0]) in map(_spelled, schema["enum"]):
                continue
            else:
                advice = "put it into the branches" if kind in SAME_INSTANCE else f"only {kind} is read here"
            raise self._refusal(node, name, advice, beside=kind)
        if values is not None:
            self._check_values(node, kind, values)
        if kind == "allOf" and len(schema["allOf"]) > 1:
            raise self._refusal(node, "allOf", "write one schema that says it all")
        if kind == "oneOf" and (pair := self._unions.overlapping(schema["oneOf"])) is not None:
            raise self._refusal(
                node,
                "oneOf",
                f"it is read as anyOf, and a value may fit both branches {pair[0]} and {pair[1]}. Write anyOf, or give "
                "the branches different types or a required property with a const of their own (at most 64 branches)",
            )

    def _check_values(self, node: Node, kind: str, values: list[Any]) -> None:
        todo = list(values)
        while todo:
            value = todo.pop()
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise self._refusal(node, kind, "it holds an integer of more than 64 bits")
            if isinstance(value, dict | list):
                todo.extend(value.values() if isinstance(value, dict) else value)

    def _check_typed(self, node: Node, types: list[str]) -> None:
        if "object" in types:
            self._check_object(node)
        if "string" in types:
            self._check_string(node)
        if "integer" in types or "number" in types:
            self._check_bounds(node, types)

    def _check_object(self, node: Node) -> None:
        schema = node.schema
        properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        if missing := [name for name in schema.get("required", []) if name not in properties]:
            advice = f"{missing[0][:100]!r} is not among the properties; describe it there"
            raise self._refusal(node, "required", advice)
        others_name = "additionalProperties" if "additionalProperties" in schema else "unevaluatedProperties"
        others = schema.get(others_name, False)
        for name, beside in _EXCLUSIVE:
            if name in schema and beside in schema:
                raise self._refusal(node, name, f"leave {name} or {beside} out", beside=beside)
        if len(patterns) > 1:
            raise self._refusal(node, "patternProperties", "give one pattern only")
        for pattern in patterns:
            self._check_pattern(node, "patternProperties", pattern)
        if "propertyNames" in schema and schema.get("additionalProperties") is False:
            raise self._refusal(node, "propertyNames", "leave one of the two out", beside=others_name)
        if properties and others is not False:
            # The grammar keeps a name of properties from being one of the others, but not where it is spelt with \u.
            for name, each in properties.items():
                if (
                    not self._twins.is_same(each, others)
                    and not self._twins.is_same(each, _ANYTHING)
                    and each is not True
                ):
                    advice = (
                        f"another property could bear the name {name[:100]!r}, spelt with an escape. Leave "
                        f"{others_name} out: then only what properties names is written"
                    )
                    raise self._refusal(node, others_name, advice, beside="properties")
        is_open = others is not False or patterns or "propertyNames" in schema
        if "minProperties" in schema and schema["minProperties"] != 0 and is_open:
            raise self._refusal(node, "minProperties", "a name may come twice. Name the properties and require them")

    def _check_names(self, node: Node) -> None:
        """xgrammar takes a schema of no type for one of strings here, but only if it stands here itself."""
        has_type = leading(node.schema) or not node.schema.keys() & set(_OF_TYPE["string"])
        if has_type and self._unions.possible_types(node.schema) != {"string"}:
            raise self._malformed(node, "must be of type string, or an enum of strings: it is about names")

    def _check_string(self, node: Node) -> None:
        schema = node.schema
        if "pattern" in schema:
            self._check_pattern(node, "pattern", schema["pattern"])
        form = schema.get("format")
        if "format" in schema and form not in _FORMATS:
            advice = f"enforced are {', '.join(_FORMATS)}. Leave it out or write a pattern"
            raise self._refusal(node, "format", advice, value=form)
        read = "format" if "format" in schema else "pattern"
        for name in ("pattern", "minLength", "maxLength") if read in schema else ():
            if name in schema and name != read:
                advice = "leave one of the two out, or say both with one pattern (a pattern holds for the whole text)"
                raise self._refusal(node, name, advice, beside=read)

    def _check_pattern(self, node: Node, keyword: str, pattern: Any) -> None:
        reason = schema_patterns.unenforced(pattern) if isinstance(pattern, str) else "no text"
        if reason:
            advice = (
                f"it has {reason}. Held are literal characters, classes like [a-z0-9_] and \\d \\w \\s, groups, | and "
                "simple repetition, for the whole text"
            )
            raise self._refusal(node, keyword, advice, value=pattern)

    def _check_bounds(self, node: Node, types: list[str]) -> None:
        for name in BOUNDS:
            bound = node.schema.get(name, 0)
            is_finite = isinstance(bound, int) or (isinstance(bound, float) and isfinite(bound))
            if isinstance(bound, bool) or not is_finite:
                raise self._malformed(node, f"has {name} that is no number")
            if "integer" in types and (bound != bound // 1 or not -(2**63) < bound < 2**63 - 1):
                raise self._refusal(node, name, "of an integer it must be a whole number of 64 bits", value=bound)
            is_exact = isinstance(bound, float) or (abs(bound) < 2**63 and float(bound) == bound)
            if "number" in types and not is_exact:
                raise self._refusal(node, name, "it is read as a double, which cannot be this integer", value=bound)

        if "number" in types and not has_a_decimal(node.schema):
            raise self._malformed(
                node, f"allows no number of at most {DECIMALS} decimals, and the engine writes no longer ones"
            )

    def _refusal(
        self, node: Node, keyword: str, advice: str, *, beside: str = "", value: Any = None
    ) -> errors.InvalidRequestError:
        shown = "" if value is None else f" {str(value)[:100]!r}"
        where = f" beside {beside}" if beside else ""
        return self._error(f"{keyword}{shown} at {node.pointer} is not enforced by the engine{where}: {advice}.")

    def _malformed(self, node: Node, what: str) -> errors.InvalidRequestError:
        return self._error(f"The schema at {node.pointer} {what}.")

    def _error(self, text: str) -> errors.InvalidRequestError:
        return errors.InvalidRequestError(text, param=self._place, code="schema_not_enforced")


def _spelled(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
