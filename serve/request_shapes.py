"""The objects within a request: messages, tools, formats. vLLM's models ignore keys they do not know, here too.

Only keys and kinds are checked; values are vLLM's to check, where it does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from registry import errors
from registry.strict_json import parse_strict_json

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

_MESSAGE_KEYS = {
    # litellm notes in provider_specific_fields what an answer held beyond OpenAI's fields, and sends it back with it.
    "assistant": {"tool_calls", "reasoning", "reasoning_content", "provider_specific_fields"},
    "tool": {"tool_call_id"},
}
# Empty fields that the SDKs' message objects carry when they are sent back.
_EMPTY_MESSAGE_KEYS = {"refusal", "audio", "function_call", "annotations", "tool_calls", "reasoning"}
_OBJECTS = ("stream_options", "response_format", "structured_outputs", "text", "reasoning")
_INPUT_ROLES = ("user", "assistant", "system", "developer")
_STRUCTURES = ("json", "json_object", "regex", "choice", "grammar")


def check(body: Mapping[str, Any]) -> None:
    """Look into the objects of ``body``.

    Raises:
        InvalidRequestError: one of them is no object, has a key that would be ignored, or is too large.
    """
    for name in _OBJECTS:
        _check_is_object(name, body.get(name))
    called: set[str] = set()
    for place, message in _entries(body, "messages"):
        _check_message(place, message)
        if message.get("role") == "tool":
            _check_answers_a_call(f"{place}.tool_call_id", message.get("tool_call_id"), called)
        called.update(_texts(call.get("id") for _, call in _entries(message, "tool_calls", place)))
    for place, item in _entries(body, "input"):
        _check_input_item(place, item)
        if item.get("type") == "function_call_output":
            _check_answers_a_call(f"{place}.call_id", item.get("call_id"), called)
        elif item.get("type") == "function_call":
            called.update(_texts([item.get("call_id")]))
    for place, tool in _entries(body, "tools"):
        _check_tool(place, tool, is_flat="input" in body)
    _check_keys("stream_options", body.get("stream_options"), {"include_usage", "continuous_usage_stats"})
    _check_tool_choice(body.get("tool_choice"), is_flat="input" in body)
    _check_response_format("response_format", body.get("response_format"))
    _check_structured_outputs(body.get("structured_outputs"))
    _check_responses_fields(body)
    schemas = [tool.get("function", tool).get("parameters") for _, tool in _entries(body, "tools")]
    _check_schema("tools", [schema for schema in schemas if schema is not None])


def asks_for_a_format(value: Any) -> bool:
    """Whether response_format, structured_outputs or text binds the answer to anything."""
    if not isinstance(value, dict):
        return False
    kind = value.get("format", value)
    return bool(kind) and not (isinstance(kind, dict) and kind.get("type") == "text")


def _check_message(place: str, message: dict[str, Any]) -> None:
    role = message.get("role")
    allowed = {"role", "content", "name"} | _MESSAGE_KEYS.get(role if isinstance(role, str) else "", set())
    known = {name: value for name, value in message.items() if value or name not in _EMPTY_MESSAGE_KEYS}
    _check_keys(place, known, allowed)
    if not isinstance(message.get("name"), str | None):
        raise errors.InvalidRequestError(
            f"{place}.name must be a text, got {_shown(message['name'])}.", param=f"{place}.name"
        )
    _check_content(f"{place}.content", message.get("content"), ("text",))
    _require_content(place, message)
    _check_calls(place, message)


def _require_content(place: str, message: dict[str, Any]) -> None:
    """An assistant's turn may have called tools instead. A message without content would be an empty turn."""
    is_said = isinstance(message.get("content"), str | list)
    if message.get("role") in ("system", "developer", "user", "tool") and not is_said:
        here = f"{place}.content"
        got = f"got {_shown(message['content'])}" if "content" in message else "and there is none"
        raise errors.InvalidRequestError(f"{here} must be a text or a list of texts, {got}.", param=here)


def _check_answers_a_call(place: str, call_id: Any, called: set[str]) -> None:
    """The whole conversation is in the request, so that the call stands before its answer. ``called``: the ids of all
    calls so far."""
    if not isinstance(call_id, str) or call_id not in called:
        got = f"got {_shown(call_id)}" if call_id is not None else "and there is none"
        raise errors.InvalidRequestError(
            f"{place} must be the id of a call that an earlier entry made, {got}. Send the call, too.", param=place
        )


def _check_calls(place: str, message: dict[str, Any]) -> None:
    """The calls of tools that an assistant made. vLLM's model looks at them later than at all else, and by then does
    not know which message they are of."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | None):
        place = f"{place}.tool_calls"
        raise errors.InvalidRequestError(f"{place} must be a list, got {_shown(calls)}.", param=place)
    for here, call in _entries(message, "tool_calls", place):
        _check_keys(here, call, {"id", "type", "function", "index"})
        if call.get("type") != "function":
            raise errors.InvalidRequestError(
                f'{here}.type must be "function", got {_shown(call.get("type"))}.', param=f"{here}.type"
            )
        _require_a_text(f"{here}.id", call.get("id"))
        function = call.get("function")
        _check_keys(f"{here}.function", function, {"name", "arguments"})
        _require_a_name(f"{here}.function", function)
        _check_arguments(f"{here}.function.arguments", call["function"].get("arguments"))


def _check_arguments(place: str, arguments: Any) -> None:
    """Of an earlier call of a tool, a JSON object as text. vLLM makes an empty object of any other text.

    Of an empty text too, which stays allowed: a call of a function without parameters may have come with one.
    """
    _require_a_text(place, arguments)
    if not arguments:
        return
    try:
        value = parse_strict_json(arguments.encode())
        json.dumps(value, ensure_ascii=False).encode()  # fails on the lone half of a surrogate pair
        reason = "" if isinstance(value, dict) else "it is no object"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    if reason:
        raise errors.InvalidRequestError(
            f"{place} must be a JSON object as text, got {_shown(arguments)}: {reason}. If a model wrote it so, send "
            '"{}" in its place or leave the call and its answer out.',
            param=place,
        )


def _check_content(place: str, content: Any, kinds: tuple[str, ...]) -> None:
    if not isinstance(content, list):
        return
    for number, part in enumerate(content):
        here = f"{place}.{number}"
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise errors.InvalidRequestError(
                f'{here} must be {{"type": "{kinds[0]}", "text": "..."}}: only text is offered.', param=here
            )
        _check_keys(here, part, {"type", "text", *(("annotations", "logprobs") if "output_text" in kinds else ())})


def _check_input_item(place: str, item: dict[str, Any]) -> None:
    """An item of the input of /v1/responses, which may be an item of an earlier output."""
    match item.get("type", "message"):
        case "message":
            _check_keys(place, item, {"type", "role", "content", "id", "status", "phase"})
            if item.get("role") not in _INPUT_ROLES:
                raise errors.InvalidRequestError(
                    f"{place}.role is {_shown(item.get('role'))}; allowed are {', '.join(_INPUT_ROLES)}.",
                    param=f"{place}.role",
                )
            kinds = ("output_text", "input_text") if item.get("role") == "assistant" else ("input_text",)
            _check_content(f"{place}.content", item.get("content"), kinds)
            _require_content(place, item)
            content = item.get("content")
            if item.get("role") == "assistant" and isinstance(content, list) and len(content) != 1:
                raise errors.InvalidRequestError(
                    f"{place}.content has {len(content)} parts; an assistant's message has one.", param=place
                )
        case "function_call":
            _check_keys(place, item, {"type", "id", "call_id", "name", "arguments", "status", "namespace"})
            _check_arguments(f"{place}.arguments", item.get("arguments"))
        case "function_call_output":
            _check_keys(place, item, {"type", "id", "call_id", "output", "status"})
            if not isinstance(item.get("output"), str):
                raise errors.InvalidRequestError(f"{place}.output must be a text.", param=f"{place}.output")
        case "reasoning":
            _check_keys(place, item, {"type", "id", "summary", "content", "status", "encrypted_content"})
        case other:
            raise errors.InvalidRequestError(
                f"{place}.type is {_shown(other)}; allowed are message, function_call, function_call_output and "
                "reasoning.",
                param=f"{place}.type",
            )


def _check_tool(place: str, tool: dict[str, Any], *, is_flat: bool) -> None:
    """``is_flat``: the form of /v1/responses, without a ``function`` object."""
    if tool.get("type", "function") != "function":
        raise errors.InvalidRequestError(
            f"{place}.type is {_shown(tool['type'])}; only function tools are offered.", param=f"{place}.type"
        )
    function = {"name", "description", "parameters", "strict"}
    _check_keys(place, tool, {"type", *function} if is_flat else {"type", "function"})
    described = tool if is_flat else tool.get("function")
    _check_keys(f"{place}.function", described, {"type", *function} if is_flat else function)
    _require_a_name(place if is_flat else f"{place}.function", described)


def _check_tool_choice(choice: Any, *, is_flat: bool) -> None:
    if not isinstance(choice, dict):
        return
    if choice.get("type", "function") != "function":
        raise errors.InvalidRequestError(
            f"tool_choice.type is {_shown(choice['type'])}; a tool is named with type function.", param="tool_choice"
        )
    _check_keys("tool_choice", choice, {"type", "name"} if is_flat else {"type", "function"})
    _check_keys("tool_choice.function", choice.get("function"), {"name"})
    _require_a_name("tool_choice" if is_flat else "tool_choice.function", choice if is_flat else choice.get("function"))


def _require_a_name(place: str, value: Any) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise errors.InvalidRequestError(f"{place} must be an object with a name.", param=place)


def _require_a_text(place: str, value: Any) -> None:
    if not isinstance(value, str):
        raise errors.InvalidRequestError(f"{place} must be a text, got {_shown(value)}.", param=place)


def _check_response_format(place: str, given: Any) -> None:
    if not isinstance(given, dict):
        return
    if given.get("type") not in ("text", "json_object", "json_schema"):
        raise errors.InvalidRequestError(
            f"{place}.type is {_shown(given.get('type'))}; allowed are text, json_object and json_schema.", param=place
        )
    _check_keys(place, given, {"type", "json_schema"})
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
        _check_keys(f"{place}.json_schema", schema, {"name", "description", "schema", "strict"})
        _check_schema(f"{place}.json_schema.schema", schema["schema"])


def _check_structured_outputs(given: Any) -> None:
    if not isinstance(given, dict):
        return
    place = "structured_outputs"
    _check_keys(place, given, set(_STRUCTURES))
    kinds = [kind for kind in _STRUCTURES if given.get(kind) is not None]
    if len(kinds) != 1:
        raise errors.InvalidRequestError(
            f"{place} must hold exactly one of {', '.join(_STRUCTURES)}; it holds {', '.join(kinds) or 'none'}.",
            param=place,
        )
    (kind,) = kinds
    value = given[kind]
    _check_schema(f"{place}.{kind}", value)
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
        _check_keys("text", {k: v for k, v in text.items() if k == "format" or (k, v) not in harmless}, {"format"})
        _check_is_object("text.format", text.get("format"))
        if isinstance(form := text.get("format"), dict):
            _check_keys("text.format", form, {"type", "name", "description", "schema", "strict"})
            _check_schema("text.format.schema", form.get("schema"))
    _check_metadata(body.get("metadata"))
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict):
        _check_keys("reasoning", {k: v for k, v in reasoning.items() if v is not None}, {"effort"})
    logprobs = "message.output_text.logprobs"
    include = body.get("include")
    for name in include if isinstance(include, list) else []:
        if name != logprobs:
            raise errors.InvalidRequestError(
                f"include has {_shown(name)}; only {logprobs} is offered.", param="include"
            )
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
            f"characters and values of at most {MAX_METADATA_VALUE}, got {_shown(pairs)}.",
            param="metadata",
        )


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


def _entries(body: Mapping[str, Any], name: str, within: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a list of objects with their places. What is no list is left to vLLM's own models."""
    prefix = f"{within}." if within else ""
    value = body.get(name)
    for number, entry in enumerate(value if isinstance(value, list) else []):
        place = f"{prefix}{name}.{number}"
        if not isinstance(entry, dict):
            raise errors.InvalidRequestError(f"{place} must be an object, got {_shown(entry)}.", param=place)
        yield place, entry


def _texts(values: Iterable[Any]) -> Iterator[str]:
    return (value for value in values if isinstance(value, str))


def _check_is_object(place: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise errors.InvalidRequestError(f"{place} must be an object, got {_shown(value)}.", param=place)


def _check_keys(place: str, value: Any, allowed: set[str]) -> None:
    if isinstance(value, dict) and (unknown := sorted(value.keys() - allowed)):
        raise errors.InvalidRequestError(
            f"{place} has the unknown key {unknown[0][:100]!r}; allowed are {', '.join(sorted(allowed))}.",
            param=f"{place}.{unknown[0][:100]}",
            code="unknown_field",
        )


def _shown(value: Any) -> str:
    return json.dumps(value)[:100]
