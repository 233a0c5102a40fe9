"""JSON schemas of the inference endpoints' bodies: vLLM's fields, cut down to what the request policy lets through.

Scalar fields are described by vLLM's own request models. Objects within a request are described here, because vLLM's
models take any key and many kinds of content that :mod:`serve.request_shapes` and :mod:`serve.conversation_shapes`
refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve import request_policy as policy
from serve import request_shapes as shapes
from serve.engine_api import Endpoint
from serve.prompt_logprobs import MAX_PROMPT_LOGPROBS
from serve.request_fields import ALLOWED, HARMLESS_VALUES, LABELS, REQUIRED

Schema = dict[str, Any]


def body_schema(engine_schema: Callable[[Endpoint], Schema], endpoint: Endpoint) -> Schema:
    """The schema of what ``endpoint`` takes, without references. ``engine_schema``: of what the engine knows."""
    known = engine_schema(endpoint)
    parts = [known, *(_resolved(part, known) for part in known.get("anyOf", []))]
    fields = {name: field for part in parts for name, field in part.get("properties", {}).items()}
    own = _objects(endpoint)
    properties = {
        name: own.get(name) or _bounded(name, _without_references(fields.get(name, {}), known))
        for name in sorted(ALLOWED[endpoint])
    }
    for name in ALLOWED[endpoint] - set(REQUIRED[endpoint]):
        properties[name] = _or_null(properties[name])
    for name, values in HARMLESS_VALUES.items():
        properties.setdefault(name, {"enum": [None, *values], "description": "Asks for nothing."})
    for name in sorted(LABELS):
        properties.setdefault(name, _text(policy.MAX_LABEL_CHARACTERS))
    schema = _closed(properties, *REQUIRED[endpoint])
    if endpoint is Endpoint.TOKENIZE:
        schema["oneOf"] = [{"required": ["prompt"]}, {"required": ["messages"]}]
    return schema


def _objects(endpoint: Endpoint) -> dict[str, Schema]:
    """What the policy says by itself, for the fields of ``endpoint``."""
    is_responses = endpoint is Endpoint.RESPONSES
    is_completion = endpoint is Endpoint.COMPLETION
    logprobs = _integer(0, policy.MAX_LOGPROBS)
    return {
        "model": {"type": "string", "minLength": 1, "description": "A name that GET /v1/models lists, or a revision."},
        "stream": {"type": ["boolean", "null"]},
        "user": _text(policy.MAX_LABEL_CHARACTERS),
        "n": _integer(1, policy.MAX_N),
        "top_logprobs": logprobs,
        "prompt_logprobs": logprobs | {"description": _OF_PROMPTS},
        **({"logprobs": logprobs | {"description": f"Beside echo: {_OF_PROMPTS}"}} if is_completion else {}),
        "temperature": _number(minimum=0),
        "truncate_prompt_tokens": {"type": ["integer", "null"], "minimum": 1},
        "top_p": _number(exclusiveMinimum=0, maximum=1),
        "min_p": _number(minimum=0, maximum=1),
        "frequency_penalty": _number(minimum=-2, maximum=2),
        "presence_penalty": _number(minimum=-2, maximum=2),
        "repetition_penalty": _number(exclusiveMinimum=0),
        "stop": _one_of(_stop_text(), _list(_stop_text(), policy.MAX_STOP_STRINGS), {"type": "null"}),
        "bad_words": _list({"type": "string"}, policy.MAX_BAD_WORDS),
        "allowed_token_ids": _list({"type": "integer"}, policy.MAX_ALLOWED_TOKEN_IDS),
        "stop_token_ids": _list({"type": "integer"}, policy.MAX_STOP_TOKEN_IDS),
        "logit_bias": {
            "type": ["object", "null"],
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": policy.MAX_LOGIT_BIAS,
        },
        "messages": _list(_message(), policy.MAX_MESSAGES) | {"minItems": 1},
        "tools": _list(_tool(is_flat=is_responses), policy.MAX_TOOLS),
        "tool_choice": _one_of({"enum": ["none", "auto", "required", None]}, _named_tool(is_flat=is_responses)),
        "response_format": _one_of(_format("json_schema"), {"type": "null"}),
        "structured_outputs": _structured_outputs(),
        "stream_options": _closed(
            {"include_usage": _FLAG, "continuous_usage_stats": _FLAG, "include_obfuscation": {"enum": [False, None]}}
        ),
        "metadata": {
            "type": "object",
            "propertyNames": {"minLength": 1, "maxLength": shapes.MAX_METADATA_KEY},
            "additionalProperties": {"type": "string", "maxLength": shapes.MAX_METADATA_VALUE},
            "maxProperties": shapes.MAX_METADATA_PAIRS,
        },
        "input": _one_of({"type": "string"}, _list(_one_of(*_input_items()), None) | {"minItems": 1}),
        "text": _closed({"format": _flat_format(), "verbosity": {"enum": ["medium", None]}}) | _NULLABLE,
        "reasoning": _closed({"effort": {"type": ["string", "null"]}}) | _NULLABLE,
        "include": {
            "type": ["array", "null"],
            "items": {"const": "message.output_text.logprobs"},
        },
    }


_OF_PROMPTS = f"Prompt tokens times n times one more than this, of all prompts: at most {MAX_PROMPT_LOGPROBS}."
_FLAG: Schema = {"type": ["boolean", "null"]}
_NULLABLE: Schema = {"type": ["object", "null"]}
_TEXT: Schema = {"type": "string"}


def _message() -> Schema:
    function = _closed({"name": _TEXT, "arguments": _TEXT}, "name", "arguments")
    call = _closed({"id": _TEXT, "type": {"const": "function"}, "function": function}, "id", "type", "function")
    content = _one_of(_TEXT, _list(_part("text"), None))
    said = {"role": {"enum": ["system", "developer", "user"]}, "content": content, "name": _TEXT}
    answered = {
        "role": {"const": "assistant"},
        "content": _one_of(_TEXT, {"type": "null"}),
        "name": _TEXT,
        "tool_calls": _list(call, None),
        "reasoning": {"type": ["string", "null"]},
        "refusal": {"type": "null"},
    }
    returned = {"role": {"const": "tool"}, "content": content, "tool_call_id": _TEXT}
    return _one_of(
        _closed(said, "role", "content"),
        _closed(answered, "role"),
        _closed(returned, "role", "content", "tool_call_id"),
    )


def _input_items() -> list[Schema]:
    said: Schema = {
        "type": {"const": "message"},
        "role": {"enum": ["system", "developer", "user"]},
        "content": _one_of(_TEXT, _list(_part("input_text"), None)),
    }
    answered: Schema = {
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "content": _one_of(_TEXT, _list(_part("output_text"), 1) | {"minItems": 1}),
    }
    call = {"type": {"const": "function_call"}, "call_id": _TEXT, "name": _TEXT, "arguments": _TEXT}
    output = _one_of(_TEXT, _list(_part("input_text"), None) | {"minItems": 1})
    returned = {"type": {"const": "function_call_output"}, "call_id": _TEXT, "output": output}
    return [
        _closed(said, "role", "content"),
        _closed(answered, "role", "content"),
        _closed(call, *call),
        _closed(returned, *returned),
    ]


def _part(kind: str) -> Schema:
    return _closed({"type": {"const": kind}, "text": _TEXT}, "type", "text")


def _tool(*, is_flat: bool) -> Schema:
    function = {"name": _TEXT, "description": _TEXT, "parameters": {"type": "object"}, "strict": _FLAG}
    kind = {"type": {"const": "function"}}
    if is_flat:
        return _closed(kind | function, "type", "name")
    return _closed(kind | {"function": _closed(function, "name")}, "type", "function")


def _named_tool(*, is_flat: bool) -> Schema:
    kind = {"type": {"const": "function"}}
    if is_flat:
        return _closed(kind | {"name": _TEXT}, "type", "name")
    return _closed(kind | {"function": _closed({"name": _TEXT}, "name")}, "type", "function")


def _format(schema_field: str) -> Schema:
    schema = {"name": _TEXT, "description": _TEXT, "schema": {"type": "object"}, "strict": _FLAG}
    return _one_of(
        _closed({"type": {"enum": ["text", "json_object"]}}, "type"),
        _closed(
            {"type": {"const": "json_schema"}, schema_field: _closed(schema, "name", "schema")}, "type", schema_field
        ),
    )


def _flat_format() -> Schema:
    schema = {"name": _TEXT, "description": _TEXT, "schema": {"type": "object"}, "strict": _FLAG}
    return _one_of(
        _closed({"type": {"enum": ["text", "json_object"]}}, "type"),
        _closed({"type": {"const": "json_schema"}, **schema}, "type", "name", "schema"),
    )


def _structured_outputs() -> Schema:
    forms: dict[str, Schema] = {
        "json": {"type": "object"},
        "json_object": {"const": True},
        "regex": {"type": "string", "maxLength": shapes.MAX_REGEX_CHARACTERS},
        "choice": _list(_TEXT, shapes.MAX_CHOICES) | {"minItems": 1},
        "grammar": {"type": "string", "maxLength": shapes.MAX_GRAMMAR_CHARACTERS},
    }
    return _one_of(*(_closed({name: form}, name) for name, form in forms.items()), {"type": "null"})


# -- schemas -------------------------------------------------------------------------------------------------------


def _closed(properties: dict[str, Schema], *required: str) -> Schema:
    """An object with these keys and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _one_of(*forms: Schema) -> Schema:
    return {"anyOf": list(forms)}


def _or_null(form: Schema) -> Schema:
    """Null asks for nothing, wherever a field may be left out."""
    is_nullable = "null" in form.get("type", ()) or {"type": "null"} in form.get("anyOf", ()) or not form
    return form if is_nullable else _one_of(form, {"type": "null"})


def _list(items: Schema, most: int | None) -> Schema:
    return {"type": "array", "items": items} | ({} if most is None else {"maxItems": most})


def _integer(least: int, most: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": least, "maximum": most}


def _number(**bounds: float) -> Schema:
    return {"type": ["number", "null"], **bounds}


def _text(most: int) -> Schema:
    return {"type": ["string", "null"], "maxLength": most}


def _stop_text() -> Schema:
    return {"type": "string", "maxLength": policy.MAX_STOP_CHARACTERS}


def _bounded(name: str, field: Schema) -> Schema:
    """vLLM's field, but prompts are neither missing nor empty, and not too many."""
    if name != "prompt":
        return field
    forms = [form for form in field.get("anyOf", [field]) if form.get("type") != "null"]
    return _one_of(*map(_prompt, forms))


def _prompt(form: Schema) -> Schema:
    if form.get("type") == "string":
        return _TEXT | {"minLength": 1}
    items = form.get("items", {})
    if form.get("type") != "array" or items.get("type") == "integer":  # one prompt as token ids
        return form | {"minItems": 1}
    return form | {"items": _prompt(items), "minItems": 1, "maxItems": policy.MAX_PROMPTS}


def _resolved(part: Schema, root: Schema) -> Schema:
    reference = part.get("$ref")
    if not isinstance(reference, str):
        return part
    found = root["$defs"][reference.rpartition("/")[2]]
    assert isinstance(found, dict)
    return found


def _without_references(part: Any, root: Schema) -> Any:
    if isinstance(part, dict):
        return {name: _without_references(value, root) for name, value in _resolved(part, root).items()}
    if isinstance(part, list):
        return [_without_references(value, root) for value in part]
    return part
