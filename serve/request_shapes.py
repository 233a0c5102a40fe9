"""The objects within a request, but for its conversation: tools and formats.

vLLM's models ignore keys they do not know, here too.

Only keys and kinds are checked; values are vLLM's to check, where it does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from registry import errors
from registry.strict_json import parse_strict_json
from serve import schema_keywords
from serve.shape_checks import check_is_object, check_keys, entries, require_a_name, shown

# The largest schema that is tried (serve/constraints.py says how), and the largest of the other forms of a constraint.
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_REGEX_CHARACTERS = 2048
MAX_GRAMMAR_CHARACTERS = 8192
MAX_CHOICES = 1024
# OpenAI's bounds.
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

_OBJECTS = ("stream_options", "response_format", "structured_outputs", "text", "reasoning")
_STRUCTURES = ("json", "json_object", "regex", "choice", "grammar")


def check(body: Mapping[str, Any]) -> None:
    """Look into the objects of ``body``.

    Raises:
        InvalidRequestError: one of them is no object, has a key that would be ignored, or is too large.
    """
    for name in _OBJECTS:
        check_is_object(name, body.get(name))
    for place, tool in entries(body, "tools"):
        _check_tool(place, tool, is_flat="input" in body)
    check_keys("stream_options", body.get("stream_options"), {"include_usage", "continuous_usage_stats"})
    _check_tool_choice(body.get("tool_choice"), is_flat="input" in body)
    _check_named_tool(body)
    _check_response_format("response_format", body.get("response_format"))
    _check_structured_outputs(body.get("structured_outputs"))
    _check_responses_fields(body)
    schemas = [tool.get("function", tool).get("parameters") for _, tool in entries(body, "tools")]
    _check_schema("tools", [schema for schema in schemas if schema is not None])
    schema_keywords.check_tools(_strict_parameters(body))


def asks_for_a_format(value: Any) -> bool:
    """Whether response_format, structured_outputs or text binds the answer to anything."""
    if not isinstance(value, dict):
        return False
    kind = value if value.keys() - {"format", "verbosity"} else value.get("format")
    return bool(kind) and not (isinstance(kind, dict) and kind.get("type") == "text")


def repeated_tool(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tool that an answer to /v1/responses must call, where ``text`` asks of the answer what this asks of its
    arguments: instructor sends both. Then there is one wish, that the call holds to it."""
    choice, text = body.get("tool_choice"), body.get("text")
    form = text.get("format") if isinstance(text, dict) else None
    if not isinstance(choice, dict) or not isinstance(form, dict) or form.get("type") != "json_schema":
        return None
    for _, tool in entries(body, "tools"):
        wished, held = (json.dumps(schema, sort_keys=True) for schema in (form.get("schema"), tool.get("parameters")))
        if tool.get("name") == choice.get("name") and wished == held:  # as JSON: to Python 1 is true
            return tool
    return None


def what_binds(body: Mapping[str, Any]) -> str | None:
    """The field that has a grammar made for the answer, or for calls in it."""
    for name in ("response_format", "structured_outputs", "text"):
        if asks_for_a_format(body.get(name)):
            return name
    choice = body.get("tool_choice")
    if not body.get("tools") or choice == "none":
        return None
    if choice not in (None, "auto"):
        return "tool_choice"
    is_strict = any(tool.get("function", tool).get("strict") for _, tool in entries(body, "tools"))
    return "strict in tools" if is_strict else None


def _check_tool(place: str, tool: dict[str, Any], *, is_flat: bool) -> None:
    """``is_flat``: the form of /v1/responses, without a ``function`` object."""
    if tool.get("type", "function") != "function":
        raise errors.InvalidRequestError(
            f"{place}.type is {shown(tool['type'])}; only function tools are offered.", param=f"{place}.type"
        )
    function = {"name", "description", "parameters", "strict"}
    check_keys(place, tool, {"type", *function} if is_flat else {"type", "function"})
    described = tool if is_flat else tool.get("function")
    check_keys(f"{place}.function", described, {"type", *function} if is_flat else function)
    require_a_name(place if is_flat else f"{place}.function", described)


def _check_tool_choice(choice: Any, *, is_flat: bool) -> None:
    if not isinstance(choice, dict):
        return
    if choice.get("type", "function") != "function":
        raise errors.InvalidRequestError(
            f"tool_choice.type is {shown(choice['type'])}; a tool is named with type function.", param="tool_choice"
        )
    check_keys("tool_choice", choice, {"type", "name"} if is_flat else {"type", "function"})
    check_keys("tool_choice.function", choice.get("function"), {"name"})
    require_a_name("tool_choice" if is_flat else "tool_choice.function", choice if is_flat else choice.get("function"))


def _check_named_tool(body: Mapping[str, Any]) -> None:
    """Behind the checks of tools and tool_choice themselves."""
    choice = body.get("tool_choice")
    if not isinstance(choice, dict):
        return
    named = choice.get("function", choice)["name"]
    offered = [tool.get("function", tool)["name"] for _, tool in entries(body, "tools")]
    if named not in offered:
        told = ", ".join(map(shown, offered))[:500] or "there are no tools"
        raise errors.InvalidRequestError(
            f"tool_choice names {shown(named)}, which is none of the tools: {told}.", param="tool_choice"
        )


def _check_response_format(place: str, given: Any) -> None:
    if not isinstance(given, dict):
        return
    if given.get("type") not in ("text", "json_object", "json_schema"):
        raise errors.InvalidRequestError(
            f"{place}.type is {shown(given.get('type'))}; allowed are text, json_object and json_schema.", param=place
        )
    check_keys(place, given, {"type", "json_schema"})
    schema = given.get("json_schema")
    if given["type"] == "json_schema" and (not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict)):
        raise errors.InvalidRequestError(
            f'{place} must be {{"type": "json_schema", "json_schema": {{"name": ..., "schema": {{...}}}}}}.',
            param=place,
        )
    if given["type"] != "json_schema" and schema is not None:
        raise errors.InvalidRequestError(
            f"{place}.json_schema has no meaning with type {given['type']}; use type json_schema.", param=place
        )
    if isinstance(schema, dict):
        check_keys(f"{place}.json_schema", schema, {"name", "description", "schema", "strict"})
        _check_answer_schema(f"{place}.json_schema.schema", schema["schema"])


def _check_structured_outputs(given: Any) -> None:
    if not isinstance(given, dict):
        return
    place = "structured_outputs"
    check_keys(place, given, set(_STRUCTURES))
    kinds = [kind for kind in _STRUCTURES if given.get(kind) is not None]
    if len(kinds) != 1:
        raise errors.InvalidRequestError(
            f"{place} must hold exactly one of {', '.join(_STRUCTURES)}; it holds {', '.join(kinds) or 'none'}.",
            param=place,
        )
    (kind,) = kinds
    value = given[kind]
    _check_schema(f"{place}.{kind}", value)
    if kind == "json":
        _check_answer_schema(f"{place}.json", _parsed(f"{place}.json", value) if isinstance(value, str) else value)
    limits = {"regex": MAX_REGEX_CHARACTERS, "grammar": MAX_GRAMMAR_CHARACTERS, "choice": MAX_CHOICES}
    if kind in limits and isinstance(value, str | list) and len(value) > limits[kind]:
        raise errors.InvalidRequestError(
            f"{place}.{kind} has a length of {len(value)}; at most {limits[kind]} is allowed.",
            param=place,
            code=f"{kind}_too_large",
        )


def _check_responses_fields(body: Mapping[str, Any]) -> None:
    text = body.get("text")
    if isinstance(text, dict):
        harmless = [("verbosity", None), ("verbosity", "medium")]  # no set: a value may be a list or an object
        check_keys("text", {k: v for k, v in text.items() if k == "format" or (k, v) not in harmless}, {"format"})
        check_is_object("text.format", text.get("format"))
        if isinstance(form := text.get("format"), dict):
            check_keys("text.format", form, {"type", "name", "description", "schema", "strict"})
            if form.get("type") == "json_schema" and not isinstance(form.get("schema"), dict):
                raise errors.InvalidRequestError(
                    f"text.format.schema must be a JSON schema, which type json_schema needs, got "
                    f"{shown(form.get('schema'))}.",
                    param="text.format.schema",
                )
            if form.get("schema") is not None:
                _check_answer_schema("text.format.schema", form["schema"])
    _check_metadata(body.get("metadata"))
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict):
        check_keys("reasoning", {k: v for k, v in reasoning.items() if v is not None}, {"effort"})
    logprobs = "message.output_text.logprobs"
    include = body.get("include")
    for name in include if isinstance(include, list) else []:
        if name != logprobs:
            raise errors.InvalidRequestError(f"include has {shown(name)}; only {logprobs} is offered.", param="include")
    if "input" in body and body.get("top_logprobs") and not include:
        raise errors.InvalidRequestError(f'top_logprobs needs include to be ["{logprobs}"].', param="top_logprobs")


def _check_metadata(pairs: Any) -> None:
    """Repeated in the answer."""
    if pairs is None:
        return
    keys, values = range(1, MAX_METADATA_KEY + 1), range(MAX_METADATA_VALUE + 1)
    is_sound = isinstance(pairs, dict) and all(
        len(key) in keys and isinstance(value, str) and len(value) in values for key, value in pairs.items()
    )
    if not is_sound or len(pairs) > MAX_METADATA_PAIRS:
        raise errors.InvalidRequestError(
            f"metadata must be an object of at most {MAX_METADATA_PAIRS} texts with keys of 1 to {MAX_METADATA_KEY} "
            f"characters and values of at most {MAX_METADATA_VALUE}, got {shown(pairs)}.",
            param="metadata",
        )


def _strict_parameters(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for place, tool in entries(body, "tools"):
        function = tool.get("function", tool)
        if function.get("strict") and function.get("parameters") is not None:
            yield (
                f"{place}.function.parameters" if "function" in tool else f"{place}.parameters",
                function["parameters"],
            )


def _parsed(place: str, text: str) -> Any:
    try:
        return parse_strict_json(text.encode())
    except (ValueError, RecursionError) as error:
        raise errors.InvalidRequestError(f"{place} must be a JSON schema: {error}.", param=place) from error


def _check_answer_schema(place: str, schema: Any) -> None:
    """What an answer is bound to, the engine must hold in full."""
    _check_schema(place, schema)
    schema_keywords.check(place, schema)


def _check_schema(place: str, schema: Any) -> None:
    """Bytes and depth: what is walked recursively later, and what is tried (:mod:`serve.constraints`)."""
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA_BYTES:
        raise errors.InvalidRequestError(
            f"{place} is {size} bytes of JSON; at most {MAX_SCHEMA_BYTES} are allowed.",
            param=place,
            code="schema_too_large",
        )
    depth, level = 0, [schema]
    while level := [child for node in level for child in _children(node)]:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise errors.InvalidRequestError(
                f"{place} is nested deeper than {MAX_SCHEMA_DEPTH} levels. Name parts in $defs, and refer to them.",
                param=place,
                code="schema_too_large",
            )


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, dict | list):
                yield child
