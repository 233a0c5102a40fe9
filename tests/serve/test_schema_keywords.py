"""A schema that passes is held to: whatever xgrammar's grammar can write is valid by the `jsonschema` library."""

from __future__ import annotations

import json
import random
from typing import Any, Literal

import jsonschema
import pytest
import torch
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from registry import errors
from serve import schema_keywords
from serve.schema_patterns import unenforced
from tests.sizes import size

STOP = 256
INTEGER = {"type": "integer"}
# Of a grammar's next bytes these are taken more often than others, so that walks end.
CLOSING = [*b'"]},:0123456789aetrufls-.\\u', STOP]
TITLED = {"type": "object", "properties": {"title": INTEGER}, "required": ["title"]}
TITLED_OTHERWISE = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}


def branch(kind: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": kind}, **more}, "required": ["kind"]}


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


REFUSED: list[tuple[Any, str]] = [
    ({"$defs": {"q": INTEGER}, "$ref": "#/$defs/q", "minimum": 700}, "minimum at # is not enforced"),
    ({"type": "integer", "minimum": 700, "anyOf": [INTEGER]}, "minimum at # is not enforced"),
    ({"type": "integer", "minimum": 700, "oneOf": [INTEGER]}, "minimum at # is not enforced"),
    ({"type": "integer", "minimum": 0, "if": {"minimum": 0}, "then": {"minimum": 800}}, "if at #"),
    (closed(a={"type": "integer", "not": {"minimum": 0}}), "not at #/properties/a"),
    (closed(a={"type": "integer", "multipleOf": 3}), "multipleOf at #/properties/a is not enforced by the engine: "),
    ({"type": "string", "enum": ["a", 1]}, "type at # is not enforced by the engine beside enum"),
    ({"type": "string", "const": 1}, "type at #"),
    ({"const": 1, "enum": [2]}, "enum at #"),
    ({"$ref": "#/$defs/q", "$defs": {"q": INTEGER}, "enum": [1]}, "enum at #"),
    ({"type": "string", "format": "date", "pattern": "^2020"}, "pattern at #"),
    ({"type": "string", "pattern": "^a$", "maxLength": 3}, "maxLength at #"),
    ({"type": "string", "format": "colour"}, "format 'colour' at #"),
    ({"type": "string", "format": "email"}, "format 'email' at #"),
    ({**closed(a=INTEGER), "required": ["a", "b"]}, "required at #"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired at #"),
    ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas at #"),
    ({"$ref": "http://example.com/a.json"}, r"\$ref 'http://example.com/a.json' at #"),
    ({"$ref": "#/$defs/none"}, "there is no '\\$defs'"),
    ({"anyOf": [{"$ref": "#"}, INTEGER]}, "leads back to itself"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "itself"),
    ({"type": "array", "items": INTEGER, "uniqueItems": True}, "uniqueItems at #"),
    ({"type": "array", "contains": INTEGER}, "contains at #"),
    ({"type": "array", "items": [INTEGER]}, "#/items must be a JSON schema"),
    ({"minimum": 5}, "minimum at # .* needs a type"),
    ({"required": ["a"]}, "required at # .* needs a type"),
    ({"allOf": [INTEGER, {"minimum": 5}]}, "allOf at #"),
    ({"oneOf": [INTEGER, {"type": "number"}]}, "oneOf at # .* 0 and 1"),
    ({"oneOf": [branch("a"), branch("b"), branch("a")]}, "oneOf at # .* 0 and 2"),
    ({"oneOf": [{**branch("a"), "required": []}, branch("b")]}, "oneOf at #"),
    ({"type": "array", "prefixItems": [TITLED, TITLED_OTHERWISE]}, "differ only in a property"),
    ({"type": "array", "prefixItems": [{"const": {"title": 1}}, {"const": {"title": 2}}]}, "differ only in"),
    ({"type": "object", "properties": {"a": INTEGER}, "additionalProperties": True}, "additionalProperties at #"),
    ({"type": "object", "additionalProperties": INTEGER, "minProperties": 2}, "minProperties at #"),
    ({"type": "object", "propertyNames": {}}, "#/propertyNames must be of type string"),
    ({"type": "object", "propertyNames": {"enum": ["a", 5]}}, "#/propertyNames must be of type string"),
    ({"type": "object", "propertyNames": {"pattern": "a"}, "additionalProperties": False}, "propertyNames at #"),
    ({"type": "object", "patternProperties": {"a": INTEGER, "b": INTEGER}}, "patternProperties at #"),
    ({"type": "object", "patternProperties": {"a": {}}, "required": ["ab"]}, "required at #"),
    ({"type": "integer", "minimum": 0.5}, "minimum '0.5' at #"),
    ({"type": "number", "minimum": 1e-7, "maximum": 1e-7}, "no number of at most 6 decimals"),
    ({"type": "number", "minimum": 2**53 + 1}, "minimum '9007199254740993' at #"),
    (closed(**{"a/b": {"type": "string", "format": "x"}}), "at #/properties/a~1b"),
    (closed(a={"$id": "b", "type": "integer"}), r"\$id at #/properties/a"),
    (False, "# is false"),
    ({"type": "banana"}, "has a type that is not among"),
    ({"type": ["null", "string", "null"]}, "has a type that names one twice"),
    ({"type": "string", "pattern": "^a{ 2}$"}, r"pattern .* at # .* it has a { that begins no {n}"),
    ({"type": "string", "pattern": "^a{2 }$"}, "pattern .* at #"),
    ({"type": "string", "pattern": "^a{,2}$"}, "pattern .* at #"),
    ({"type": "string", "pattern": "^a{x}$"}, "pattern .* at #"),
    ({"type": "number", "minimum": 10**400}, "minimum '1000"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "says"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_the_grammar_would_drop_is_refused_by_keyword_and_place(schema: Any, says: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match=says) as caught:
        schema_keywords.check("response_format", schema)
    assert (caught.value.param, caught.value.code) == ("response_format", "schema_not_enforced")


class Colour(BaseModel):
    """One of a few, and how strong."""

    kind: Literal["colour"] = Field(description="always this")
    name: Literal["red", "green"] = "red"
    strength: int | None = Field(None, ge=100, le=200, description="in percent")


class Shape(BaseModel):
    kind: Literal["shape"]
    title: str = Field(title="Title", examples=["a"])
    corners: list[tuple[float, float]] = Field(min_length=1, max_length=3)
    parts: list[Shape] | None = None


class Drawing(BaseModel):
    title: str = Field(max_length=20)
    shape: Shape = Field(description="beside a reference")
    either: Colour | Shape = Field(discriminator="kind")
    named: dict[str, int]
    code: str = Field(pattern=r"^[A-Z]{2,3}-\d+$")
    share: float = Field(gt=0, lt=1)


@pytest.mark.parametrize(
    "schema",
    [
        Colour.model_json_schema(),
        Shape.model_json_schema(),
        Drawing.model_json_schema(),
        Drawing.model_json_schema(mode="serialization"),
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x", "x-own": {"not": 1}, "type": "object"},
        {"oneOf": [branch("a"), branch("b", title=INTEGER), {"type": "null"}], "discriminator": {}},
        {"$defs": {"a": {"enum": ["x", "y"], "type": "string"}}, "type": "string", "$ref": "#/$defs/a", "title": "A"},
        {"allOf": [INTEGER], "default": 1},
        {"type": "object", "properties": {"not": INTEGER, "minimum": INTEGER}},
        {"type": "string", "pattern": "^a{2}b{1,}(?:cd){0,3}$"},
        {"type": "object", "patternProperties": {"^x-[a-z]+$": {"type": "string"}}},
        {"type": "object", "propertyNames": {"pattern": "^[a-z]$"}, "additionalProperties": INTEGER},
        True,
        {},
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_libraries_write_and_the_engine_holds_passes_and_is_held(compiler: Any, schema: Any) -> None:
    schema_keywords.check("response_format", schema)
    assert_holds(compiler, schema, num_walks=20)


def test_parameters_of_strict_tools_share_one_schema() -> None:
    schema_keywords.check_tools([("tools.0", TITLED), ("tools.1", TITLED)])
    with pytest.raises(
        errors.InvalidRequestError, match=r"taken by the engine for the schema at # in tools\.0"
    ) as caught:
        schema_keywords.check_tools([("tools.0", TITLED), ("tools.1", TITLED_OTHERWISE)])
    assert caught.value.param == "tools.1"
    with pytest.raises(errors.InvalidRequestError, match=r"#/\$defs/name only"):
        schema_keywords.check_tools([("tools.0", closed(a={"$ref": "#"}))])


@pytest.mark.parametrize("keyword", ["$defs", "definitions"])
def test_strict_tools_whose_definitions_differ_in_what_they_say_of_themselves_mean_the_same(keyword: str) -> None:
    def parameters(**annotations: str) -> dict[str, Any]:
        return {**closed(a=INTEGER), keyword: {"A": {"enum": ["b", "c"], **annotations}}}

    told = [parameters(description="first"), parameters(description="second"), parameters(title="A")]
    schema_keywords.check_tools([(f"tools.{number}", schema) for number, schema in enumerate(told)])
    with pytest.raises(errors.InvalidRequestError, match="taken by the engine"):
        schema_keywords.check_tools(
            [
                (f"tools.{number}", {**closed(a=INTEGER), keyword: {name: INTEGER}})
                for number, name in enumerate(("title", "default"))
            ]
        )


@pytest.fixture(scope="module")
def compiler() -> xgrammar.GrammarCompiler:
    """Of single bytes, with JSON's own characters a few times more often than others."""
    vocabulary = [bytes([byte]) for byte in range(256)] + [b"</s>"]
    information = xgrammar.TokenizerInfo(
        vocabulary, vocab_type=xgrammar.VocabType.RAW, vocab_size=len(vocabulary), stop_token_ids=[STOP]
    )
    return xgrammar.GrammarCompiler(information, max_threads=1)


def walk(compiled: xgrammar.CompiledGrammar, choose: random.Random, most: int) -> bytes | None:
    """A text of the grammar; ``None``: it did not end in ``most`` bytes."""
    matcher = xgrammar.GrammarMatcher(compiled)
    bitmask = xgrammar.allocate_token_bitmask(1, STOP + 1)
    text = bytearray()
    for _ in range(most):
        matcher.fill_next_token_bitmask(bitmask)
        allowed = torch.nonzero((bitmask[0].unsqueeze(1) >> torch.arange(32, dtype=torch.int32)).flatten() & 1)
        bytes_allowed = [token for token in allowed.flatten().tolist() if token <= STOP]
        if not bytes_allowed:
            return None
        closing = [token for token in CLOSING if token in bytes_allowed]
        token = choose.choice(closing if closing and choose.random() < 0.8 else bytes_allowed)
        if STOP in bytes_allowed and choose.random() < 0.3:
            token = STOP
        assert matcher.accept_token(token)
        if token == STOP:
            return bytes(text)
        text.append(token)
    return None


def is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def assert_holds(compiler: Any, schema: Any, *, num_walks: int, seed: int = 0) -> int:
    """How many texts were judged. Where a length is bounded xgrammar lets raw control characters through, and for [^a]
    bytes that are no UTF-8: faults of its text and not of the schema. The first are read, the others not judged."""
    compiled = compiler.compile_json_schema(json.dumps(schema))
    validator = jsonschema.Draft202012Validator(schema)
    num_judged = 0
    for number in range(num_walks):
        text = walk(compiled, random.Random(f"{seed} {number}"), 200)
        if text is not None and is_utf8(text):
            validator.validate(json.loads(text.decode(), strict=False))
            num_judged += 1
    return num_judged


def sometimes(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


names = st.sampled_from(["a", "b", "title", "ab"])
values = st.sampled_from([None, True, 0, 1, -3, 1.0, 2.5, "a", "b", "", [1], {"a": 1}, {"title": 1}, {"title": "a"}])
counts = st.integers(0, 3)
patterns = st.lists(
    st.sampled_from(["a", "[ab]", "\\d", "\\w", "\\s", ".", "^", "$", "|", "(", ")", "*", "+", "?", "{2}", "[^a]",
                     "\\S", "\\.", "(?:", "(?!", "\\\\", '"', '["a]', "é", "[a-é]", "[\\d-]", "\\b"]), max_size=5,
).map("".join)  # fmt: skip
types = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])
bounds = st.one_of(st.integers(-200, 200), st.floats(-9, 9).map(lambda bound: round(bound, 3)), st.just(1e-7))
formats = st.sampled_from(["date", "time", "uuid", "ipv4", "email", "json-pointer", "colour", "hostname", "uri"])
annotations = {"title": st.just("T"), "description": st.just("D"), "default": values}


def within(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas of schemas; each keyword as often beside others as alone."""
    objects = st.dictionaries(names, inner, max_size=3)
    keywords: dict[str, st.SearchStrategy[Any]] = {
        **annotations,
        "type": types | st.lists(types, min_size=1, max_size=2),
        "enum": st.lists(values, min_size=1, max_size=3),
        "const": values,
        "$ref": st.sampled_from(["#", "#/$defs/a", "#/$defs/b", "#/properties/a", "http://a", "#a"]),
        **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), st.lists(inner, min_size=1, max_size=3)),
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), bounds),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), counts),
        **dict.fromkeys(("items", "not", "if", "then", "contains", "unevaluatedItems"), inner),
        **dict.fromkeys(("additionalProperties", "unevaluatedProperties"), inner | st.booleans()),
        "pattern": patterns,
        "format": formats,
        "properties": objects,
        # jsonschema does not find that an empty pattern matches where additionalProperties is false.
        "patternProperties": st.dictionaries(patterns.filter(bool), inner, max_size=2),
        "propertyNames": inner | sometimes(pattern=patterns, enum=st.lists(values, min_size=1), type=types),
        "required": st.lists(names, unique=True, max_size=3),
        "uniqueItems": st.booleans(),
        "multipleOf": st.just(3),
        "dependentRequired": st.just({"a": ["b"]}),
    }
    of_type: dict[str, tuple[str, ...]] = {
        "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties",
                   "patternProperties", "propertyNames", "unevaluatedProperties"),
        "array": ("items", "prefixItems", "minItems", "maxItems", "unevaluatedItems", "uniqueItems"),
        "string": ("minLength", "maxLength", "pattern", "format"),
        "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        "integer": ("minimum", "maximum", "exclusiveMinimum", "multipleOf"),
    }  # fmt: skip

    def some(allowed: tuple[str, ...], most: int) -> st.SearchStrategy[dict[str, Any]]:
        chosen = st.lists(st.sampled_from(allowed), max_size=most, unique=True)
        return chosen.flatmap(lambda each: st.fixed_dictionaries({name: keywords[name] for name in each}))

    typed = st.sampled_from([*of_type]).flatmap(
        lambda name: st.tuples(some(of_type[name], 4), some(tuple(annotations), 1)).map(
            lambda parts: {"type": name, **parts[0], **parts[1]}
        )
    )
    lone = st.sampled_from(["enum", "const", "$ref", "anyOf", "oneOf", "allOf"]).flatmap(
        lambda name: st.tuples(keywords[name], some(("type", *annotations), 1)).map(
            lambda parts: {name: parts[0], **parts[1]}
        )
    )
    require_all = objects.map(lambda properties: closed(**properties))
    return st.one_of(typed, typed, require_all, lone, some(tuple(keywords), 3))


small = st.one_of(st.booleans(), sometimes(type=types), sometimes(type=types, enum=st.lists(values, min_size=1)))
schemas = st.tuples(st.recursive(small, within, max_leaves=6), st.dictionaries(names, small, max_size=2)).map(
    lambda parts: {**parts[0], "$defs": parts[1]} if isinstance(parts[0], dict) else parts[0]
)


def passes(schema: Any) -> bool:
    try:
        schema_keywords.check("response_format", schema)
    except errors.InvalidRequestError:
        return False
    return True


@settings(max_examples=size(300, 100_000), deadline=None)
@given(schemas, st.integers(0, 2**32))
def test_what_passes_is_held_in_every_answer(compiler: Any, schema: Any, seed: int) -> None:
    schema = json.loads(json.dumps(schema))
    if passes(schema):
        try:
            compiler.compile_json_schema(json.dumps(schema))
        except RuntimeError:
            return  # xgrammar's own refusal is a refusal too
        assert_holds(compiler, schema, num_walks=4, seed=seed)


@settings(max_examples=size(200, 50_000), deadline=None)
@given(patterns, st.integers(0, 2**32))
def test_a_pattern_that_passes_is_held(compiler: Any, pattern: str, seed: int) -> None:
    schema = {"type": "string", "pattern": pattern}
    if unenforced(pattern) is None:
        try:
            compiler.compile_json_schema(json.dumps(schema))
        except RuntimeError:
            return
        assert_holds(compiler, schema, num_walks=4, seed=seed)
