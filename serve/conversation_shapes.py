"""The conversation within a request: the messages of a chat, the items of the input of /v1/responses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from registry import errors
from registry.strict_json import parse_strict_json
from serve.shape_checks import check_keys, entries, require_a_name, require_a_text, shown

_MESSAGE_KEYS = {
    # litellm notes in provider_specific_fields what an answer held beyond OpenAI's fields, and sends it back with it.
    "assistant": {"tool_calls", "reasoning", "reasoning_content", "provider_specific_fields"},
    "tool": {"tool_call_id"},
}
# Empty fields that the SDKs' message objects carry when they are sent back.
_EMPTY_MESSAGE_KEYS = {"refusal", "audio", "function_call", "annotations", "tool_calls", "reasoning"}
_INPUT_ROLES = ("user", "assistant", "system", "developer")


def check(body: Mapping[str, Any]) -> None:
    """Look into ``messages`` and ``input``.

    Raises:
        InvalidRequestError: an entry has a key that would be ignored, says nothing, or answers a call that nobody made.
    """
    called: set[str] = set()
    for place, message in entries(body, "messages"):
        _check_message(place, message)
        if message.get("role") == "tool":
            _check_answers_a_call(f"{place}.tool_call_id", message.get("tool_call_id"), called)
        called.update(call["id"] for _, call in entries(message, "tool_calls", place))
    for place, item in entries(body, "input"):
        _check_input_item(place, item)
        if item.get("type") == "function_call_output":
            _check_answers_a_call(f"{place}.call_id", item.get("call_id"), called)
        elif item.get("type") == "function_call":
            called.add(item["call_id"])


def _check_message(place: str, message: dict[str, Any]) -> None:
    role = message.get("role")
    allowed = {"role", "content", "name"} | _MESSAGE_KEYS.get(role if isinstance(role, str) else "", set())
    known = {name: value for name, value in message.items() if value or name not in _EMPTY_MESSAGE_KEYS}
    check_keys(place, known, allowed)
    if not isinstance(message.get("name"), str | None):
        raise errors.InvalidRequestError(
            f"{place}.name must be a text, got {shown(message['name'])}.", param=f"{place}.name"
        )
    _check_content(f"{place}.content", message.get("content"), ("text",))
    _require_content(place, message)
    _check_calls(place, message)


def _require_content(place: str, message: dict[str, Any]) -> None:
    """An assistant's turn may have called tools instead. A message without content would be an empty turn."""
    content = message.get("content")
    is_said = isinstance(content, str) or (isinstance(content, list) and content)
    if message.get("role") in ("system", "developer", "user", "tool") and not is_said:
        here = f"{place}.content"
        got = f"got {shown(message['content'])}" if "content" in message else "and there is none"
        raise errors.InvalidRequestError(f"{here} must be a text or a list with texts, {got}.", param=here)


def _check_answers_a_call(place: str, call_id: Any, called: set[str]) -> None:
    """The whole conversation is in the request, so that the call stands before its answer. ``called``: the ids of all
    calls so far."""
    if not isinstance(call_id, str) or call_id not in called:
        got = f"got {shown(call_id)}" if call_id is not None else "and there is none"
        raise errors.InvalidRequestError(
            f"{place} must be the id of a call that an earlier entry made, {got}. Send the call, too.", param=place
        )


def _check_calls(place: str, message: dict[str, Any]) -> None:
    """The calls of tools that an assistant made. vLLM's model looks at them later than at all else, and by then does
    not know which message they are of."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | None):
        place = f"{place}.tool_calls"
        raise errors.InvalidRequestError(f"{place} must be a list, got {shown(calls)}.", param=place)
    for here, call in entries(message, "tool_calls", place):
        check_keys(here, call, {"id", "type", "function", "index"})
        if call.get("type") != "function":
            raise errors.InvalidRequestError(
                f'{here}.type must be "function", got {shown(call.get("type"))}.', param=f"{here}.type"
            )
        require_a_text(f"{here}.id", call.get("id"))
        function = call.get("function")
        check_keys(f"{here}.function", function, {"name", "arguments"})
        require_a_name(f"{here}.function", function)
        _check_arguments(f"{here}.function.arguments", call["function"].get("arguments"))


def _check_arguments(place: str, arguments: Any) -> None:
    """Of an earlier call of a tool, a JSON object as text. vLLM makes an empty object of any other text.

    Of an empty text too, which stays allowed: a call of a function without parameters may have come with one.
    """
    require_a_text(place, arguments)
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
            f"{place} must be a JSON object as text, got {shown(arguments)}: {reason}. If a model wrote it so, send "
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
        check_keys(here, part, {"type", "text", *(("annotations", "logprobs") if "output_text" in kinds else ())})


def _check_input_item(place: str, item: dict[str, Any]) -> None:
    """An item of the input of /v1/responses, which may be an item of an earlier output."""
    match item.get("type", "message"):
        case "message":
            check_keys(place, item, {"type", "role", "content", "id", "status", "phase"})
            if item.get("role") not in _INPUT_ROLES:
                raise errors.InvalidRequestError(
                    f"{place}.role is {shown(item.get('role'))}; allowed are {', '.join(_INPUT_ROLES)}.",
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
            check_keys(place, item, {"type", "id", "call_id", "name", "arguments", "status", "namespace"})
            require_a_text(f"{place}.call_id", item.get("call_id"))
            _check_arguments(f"{place}.arguments", item.get("arguments"))
        case "function_call_output":
            check_keys(place, item, {"type", "id", "call_id", "output", "status"})
            if not isinstance(item.get("output"), str):
                raise errors.InvalidRequestError(f"{place}.output must be a text.", param=f"{place}.output")
        case "reasoning":
            check_keys(place, item, {"type", "id", "summary", "content", "status", "encrypted_content"})
        case other:
            raise errors.InvalidRequestError(
                f"{place}.type is {shown(other)}; allowed are message, function_call, function_call_output and "
                "reasoning.",
                param=f"{place}.type",
            )
