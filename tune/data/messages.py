"""What a conversation must look like before a template sees it. Knows lists and dicts, no files, no tokenizer.

Shapes follow OpenAI's ChatCompletionRequestMessage types (openai.types.chat), and what /v1/chat/completions of this
service takes is taken here: null asks for nothing, and which roles may follow each other is for the chat template to
say. Rules that go beyond them keep rows servable: a prompt must come before each trained answer, an answer must say
something, and tool answers must belong to calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from registry.strict_json import parse_strict_json
from tune.data.faults import row_fault
from tune.data.served_form import joined_content

_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS_OF_ROLE = {
    "system": ("role", "content", "name"),
    "developer": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "weight", "tool_calls", "reasoning", "reasoning_content"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
# Fields of the SDKs' message objects, which hold nothing in most answers.
_SDK_KEYS = {
    "refusal": "is not trained: only content is; write the text there",
    "audio": "is not trained: only text is",
    "function_call": "is the old form; write tool_calls instead",
    "annotations": "is not trained: only content is; leave it out",
}
_EMPTY_KEYS = frozenset({*_SDK_KEYS, "tool_calls", "reasoning", "reasoning_content"})
# litellm notes in provider_specific_fields what an answer held beyond OpenAI's fields; the parse and stream helpers of
# OpenAI's SDKs note beside a text or a call's arguments the value that they have read there.
_UNREAD_KEYS = ("provider_specific_fields",)
_UNREAD_KEYS_OF_AN_ANSWER = (*_UNREAD_KEYS, "parsed")

_TOOL_FIELDS: tuple[tuple[str, type, str], ...] = (
    ("description", str, "a text"),
    ("parameters", dict, "a JSON schema object"),
    ("strict", bool, "true or false"),
)


def unknown_key_reason(key: str, allowed: Iterable[str]) -> str:
    known = tuple(allowed)
    key = key[:80]  # a key of megabytes would take difflib seconds, and no log wants it
    near = get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key {key!r}; {hint}allowed: {', '.join(known)}"


def check_messages(given: object, line: int) -> tuple[tuple[dict[str, Any], ...], tuple[bool, ...]]:
    """Check one row's ``messages``.

    Returns:
        The messages without ``weight`` and without what asks for nothing, and for each whether it is trained.

    Raises:
        InvalidDataError: with ``line`` and a reason that names the message by its index.
    """
    if not isinstance(given, list):
        _refuse(line, "messages", f"messages must be a list, got {_shown(given)}", "messages_shape")
    if not given:
        _refuse(line, "messages", "messages is empty", "messages_shape")
    messages: list[dict[str, Any]] = []
    trained: list[bool] = []
    open_calls: set[str] = set()
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        role = _check_role(message, where, line)
        said = _said(message, *(_UNREAD_KEYS_OF_AN_ANSWER if role == "assistant" else _UNREAD_KEYS))
        cleaned, weight = _check_message(said, role, where, line)
        if role == "tool":
            call_id = cleaned["tool_call_id"]
            if call_id not in open_calls:
                reason = f"{where} answers the call {call_id!r}, which is not open"
                _refuse(line, f"{where}.tool_call_id", reason, "tool_order")
            open_calls.remove(call_id)
        elif open_calls:
            reason = f"{where}: the tool calls {sorted(open_calls)} have no answer before this message"
            _refuse(line, where, reason, "tool_order")
        if "tool_calls" in cleaned:
            open_calls = {call["id"] for call in cleaned["tool_calls"]}
        messages.append(cleaned)
        trained.append(role == "assistant" and weight == 1)
    _check_targets(messages, trained, line)
    return tuple(messages), tuple(trained)


def check_tools(given: object, line: int) -> tuple[dict[str, Any], ...] | None:
    """Check one row's ``tools``; ``None`` where the row has none."""
    if given is None or given == []:
        return None
    if not isinstance(given, list):
        _refuse(line, "tools", f"tools must be a list of tools, got {_shown(given)}", "tool_definition")
    for index, tool in enumerate(given):
        where = f"tools[{index}]"
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            reason = f"{where} must be {{type: 'function', function: {{...}}}}, got {_shown(tool)}"
            _refuse(line, where, reason, "tool_definition")
        _check_keys(tool, ("type", "function"), where, line)
        function = tool["function"]
        _check_keys(function, ("name", "description", "parameters", "strict"), f"{where}.function", line)
        if not isinstance(function.get("name"), str) or not function["name"]:
            _refuse(line, f"{where}.function.name", f"{where}.function.name must be a name", "tool_definition")
        for key, kind, what in _TOOL_FIELDS:
            if not isinstance(function.get(key), kind | None):
                reason = f"{where}.function.{key} must be {what}, got {_shown(function[key])}"
                _refuse(line, f"{where}.function.{key}", reason, "tool_definition")
    return tuple(given)


def _said(given: dict[str, Any], *unread: str) -> dict[str, Any]:
    """Of a message, a call or a part, without the keys that ask for nothing: ``datasets`` writes null for each key that
    another one has."""
    return {
        key: value
        for key, value in given.items()
        if value is not None and (value or key not in _EMPTY_KEYS) and key not in unread
    }


def _check_role(message: object, where: str, line: int) -> str:
    if not isinstance(message, dict):
        reason = f"{where} must be an object with role and content, got {_shown(message)}"
        _refuse(line, where, reason, "messages_shape")
    if "role" not in message:
        _refuse(line, f"{where}.role", f"{where} has no role; allowed: {', '.join(_ROLES)}", "unknown_role")
    role = message["role"]
    if not isinstance(role, str) or role not in _ROLES:
        reason = f"{where} has the unknown role {_shown(role)}; allowed: {', '.join(_ROLES)}"
        _refuse(line, f"{where}.role", reason, "unknown_role")
    return role


def _check_message(message: dict[str, Any], role: str, where: str, line: int) -> tuple[dict[str, Any], int]:
    """One message in template form, and its weight (1 for roles that carry none)."""
    for key, why in _SDK_KEYS.items():
        if key in message:
            kind = "old_format" if key == "function_call" else "unknown_key"
            _refuse(line, f"{where}.{key}", f"{where}.{key} {why}", kind)
    _check_keys(message, _KEYS_OF_ROLE[role], where, line)
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        _refuse(line, f"{where}.weight", f"{where}.weight must be 0 or 1, got {_shown(weight)}", "weight")
    cleaned: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls")
    if calls is not None:
        cleaned["tool_calls"] = _check_tool_calls(calls, f"{where}.tool_calls", line)
    cleaned["content"] = _check_content(message.get("content"), role, f"{where}.content", line)
    reasoning = message.get("reasoning", message.get("reasoning_content"))
    if reasoning is not None:
        cleaned["reasoning"] = _check_reasoning(message, reasoning, where, line)
    if role == "assistant" and weight == 1 and calls is None and not joined_content(cleaned["content"]).strip():
        reason = f"{where}.content is empty, so the answer would teach to say nothing; leave it out or set weight 0"
        _refuse(line, f"{where}.content", reason, "empty_content")
    if role == "tool":
        if not isinstance(message.get("tool_call_id"), str) or not message["tool_call_id"]:
            reason = f"{where} (a tool's answer) needs the tool_call_id it answers"
            _refuse(line, f"{where}.tool_call_id", reason, "tool_order")
        cleaned["tool_call_id"] = message["tool_call_id"]
    if "name" in message:
        if not isinstance(message["name"], str):
            reason = f"{where}.name must be a text, got {_shown(message['name'])}"
            _refuse(line, f"{where}.name", reason, "name")
        cleaned["name"] = message["name"]
    return cleaned, int(weight)


def _check_content(content: object, role: str, where: str, line: int) -> str | list[dict[str, Any]]:
    """A text, or its parts where there are several or none."""
    if content is None and role == "assistant":
        return []
    if isinstance(content, list):
        parts = _checked_parts(content, where, line)
        if not parts and role != "assistant":
            _refuse(line, where, f"{where} is empty", "empty_content")
        return str(parts[0]["text"]) if len(parts) == 1 else parts
    if not isinstance(content, str):
        reason = f"{where} must be a string or a list of text parts, got {_shown(content)}"
        _refuse(line, where, reason, "content_type")
    return content


def _check_reasoning(message: dict[str, Any], reasoning: object, where: str, line: int) -> str:
    """``reasoning_content`` is the older name of ``reasoning``."""
    key = "reasoning" if "reasoning" in message else "reasoning_content"
    if not isinstance(reasoning, str):
        reason = f"{where}.{key} must be a text, got {_shown(reasoning)}"
        _refuse(line, f"{where}.{key}", reason, "content_type")
    if message.get("reasoning_content", reasoning) != reasoning:
        reason = f"{where}: reasoning and reasoning_content are two names of one text, and differ; leave one out"
        _refuse(line, f"{where}.reasoning_content", reason, "content_type")
    return reasoning


def _checked_parts(parts: Sequence[object], where: str, line: int) -> list[dict[str, Any]]:
    checked = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            reason = f"{where}[{index}] must be {{type: 'text', text: '...'}}, got {_shown(part)}; only text is trained"
            _refuse(line, f"{where}[{index}]", reason, "content_type")
        part = _said(part)
        _check_keys(part, ("type", "text"), f"{where}[{index}]", line)
        checked.append(part)
    return checked


def _check_tool_calls(calls: object, where: str, line: int) -> list[dict[str, Any]]:
    """Arguments come as a JSON text (OpenAI) and leave as an object, as templates and vLLM take them.

    A call's ``index``, its place in a stream, is left out.
    """
    if not isinstance(calls, list):
        _refuse(line, where, f"{where} must be a list of calls, got {_shown(calls)}", "tool_call")
    cleaned = []
    for index, call in enumerate(calls):
        place = f"{where}[{index}]"
        if not isinstance(call, dict) or call.get("type") != "function" or not isinstance(call.get("function"), dict):
            reason = f"{place} must be {{id, type: 'function', function: {{name, arguments}}}}"
            _refuse(line, place, reason, "tool_call")
        _check_keys(_said(call), ("id", "type", "function", "index"), place, line)
        function = _said(call["function"], "parsed_arguments")
        _check_keys(function, ("name", "arguments"), f"{place}.function", line)
        if not isinstance(call.get("id"), str) or not call["id"]:
            _refuse(line, f"{place}.id", f"{place}.id must be a text that the tool's answer repeats", "tool_call")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            _refuse(line, f"{place}.function.name", f"{place}.function.name must be a name", "tool_call")
        arguments = _decoded_arguments(function.get("arguments"), f"{place}.function.arguments", line)
        cleaned.append({"id": call["id"], "type": "function", "function": {"name": name, "arguments": arguments}})
    ids = [call["id"] for call in cleaned]
    if len(set(ids)) != len(ids):
        _refuse(line, where, f"{where}: two calls have the same id", "tool_call")
    return cleaned


def _decoded_arguments(arguments: object, where: str, line: int) -> dict[str, Any]:
    if not isinstance(arguments, str):
        reason = f"{where} must be a JSON object written as a string, got {_shown(arguments)}"
        _refuse(line, where, reason, "tool_arguments")
    if not arguments:
        return {}  # as serving reads it: some models call a function without parameters so
    try:
        decoded = parse_strict_json(arguments.encode("utf-8"))
        json.dumps(decoded, ensure_ascii=False).encode("utf-8")  # half a surrogate pair fails here
    except (ValueError, RecursionError) as error:
        reason = f"{where} is not valid JSON: {error}"
        raise row_fault(line, reason, "tool_arguments", where) from error
    if not isinstance(decoded, dict):
        _refuse(line, where, f"{where} must hold a JSON object, got {_shown(decoded)}", "tool_arguments")
    return decoded


def _check_targets(messages: Sequence[dict[str, Any]], trained: Sequence[bool], line: int) -> None:
    if trained[0]:
        reason = (
            "messages[0] is an answer to nothing, which serving is never asked for; put its prompt before it, or give "
            "it weight 0 to be read alone"
        )
        _refuse(line, "messages[0]", reason, "role_order")
    if not any(message["role"] == "assistant" for message in messages):
        _refuse(line, "messages", "there is no assistant message, so there is nothing to learn", "nothing_to_learn")
    if messages[-1]["role"] != "assistant":
        reason = f"the last message must be the assistant's, got {messages[-1]['role']!r}"
        _refuse(line, "messages", reason, "role_order")
    if not any(trained):
        _refuse(
            line, "messages", "every assistant message has weight 0, so there is nothing to learn", "nothing_to_learn"
        )


def _check_keys(given: dict[str, Any], allowed: Sequence[str], where: str, line: int) -> None:
    for key in given:
        if key not in allowed:
            _refuse(line, f"{where}.{key[:80]}", f"{where}: {unknown_key_reason(key, allowed)}", "unknown_key")


def _shown(value: object) -> str:
    """A value as it stands in a message: short, and safe to print."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    except TypeError:  # a type that only Parquet and Arrow know: a date, bytes, a decimal
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(line: int, param: str, reason: str, kind: str) -> NoReturn:
    raise row_fault(line, reason, kind, param)
