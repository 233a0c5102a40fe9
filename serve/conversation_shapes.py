"""The conversation within a request: the messages of a chat, the items of the input of /v1/responses.

What means the same in several forms is brought into the one that vLLM reads, and what nobody reads is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from registry import errors
from registry.strict_json import parse_strict_json
from serve.shape_checks import check_keys, drop_keys, drop_nulls, entries, require_a_name, require_a_text, shown

_MESSAGE_KEYS = {
    # litellm notes in provider_specific_fields what an answer held beyond OpenAI's fields, and sends it back with it.
    "assistant": {"tool_calls", "reasoning", "reasoning_content", "provider_specific_fields"},
    "tool": {"tool_call_id"},
}
_PARSED, _PARSED_ARGUMENTS = "parsed", "parsed_arguments"
"""What the ``parse`` and ``stream`` helpers of OpenAI's SDKs note beside a text that they have read: the value that it
is. They send it back with the text; nobody reads it."""
_NOT_TAKEN = {
    "refusal": "only content is read; write the text there",
    "audio": "only text is offered",
    "function_call": "OpenAI replaced it; use tool_calls",
    "annotations": "only content is read; leave it out",
}
"""Of a message, what OpenAI has and nobody here, and what to do."""
# Empty fields that the SDKs' message objects carry when they are sent back, whatever their role.
_EMPTY_MESSAGE_KEYS = {*_NOT_TAKEN}.union(*_MESSAGE_KEYS.values())
_INPUT_ROLES = ("user", "assistant", "system", "developer")
# Most chat templates pass over a message of a role that they do not know.
_MESSAGE_ROLES = (*_INPUT_ROLES, "tool")
_STATUSES = ("in_progress", "completed", "incomplete")
_ITEM_KEYS = {
    "message": {"type", "role", "content", "id", "status", "phase"},
    "function_call": {"type", "id", "call_id", "name", "arguments", "status", "namespace"},
    "function_call_output": {"type", "id", "call_id", "output", "status"},
    "reasoning": {"type", "id", "summary", "content", "status", "encrypted_content"},
}
_OUTPUT_TEXT_KEYS = ("annotations", "logprobs", _PARSED)
# How OpenAI says of a call that it was made as all calls here are. Its python SDK sends ``async`` back as ``async_``.
_USUAL_CALL = {"async": False, "async_": False, "caller": {"type": "direct"}}


def check(body: Mapping[str, Any]) -> None:
    """Look into ``messages`` and ``input``, whose entries are changed in place.

    Raises:
        InvalidRequestError: there are no entries, or one has a key that would be ignored, is of a role that nobody has,
            says nothing, or answers a call that nobody made.
    """
    for name in ("messages", "input"):
        if body.get(name) == []:
            raise errors.InvalidRequestError(f"{name} is empty; send at least one entry.", param=name)
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
    role = _role(place, message, _MESSAGE_ROLES)
    drop_nulls(message, but="content")  # whose lack is told of in other words
    if role == "assistant":
        drop_keys(message, _PARSED)
    known = {name: value for name, value in message.items() if value or name not in _EMPTY_MESSAGE_KEYS}
    for name in known.keys() & _NOT_TAKEN.keys():
        here = f"{place}.{name}"
        raise errors.InvalidRequestError(
            f"{here} is {shown(known[name])}, which is not taken: {_NOT_TAKEN[name]}.", param=here
        )
    check_keys(place, known, {"role", "content", "name"} | _MESSAGE_KEYS.get(role, set()))
    require_a_text(f"{place}.name", message.get("name", ""))
    _check_content(f"{place}.content", message.get("content"), ("text",))
    _require_content(place, message)
    _check_calls(place, message)


def _role(place: str, entry: Mapping[str, Any], allowed: tuple[str, ...]) -> str:
    role = entry.get("role")
    if not isinstance(role, str) or role not in allowed:
        raise errors.InvalidRequestError(
            f"{place}.role is {shown(role)}; allowed are {', '.join(allowed)}.", param=f"{place}.role"
        )
    return role


def _require_content(place: str, message: dict[str, Any]) -> None:
    """An assistant's turn may have called tools instead. A message without content would be an empty turn."""
    content = message.get("content")
    is_said = isinstance(content, str) or (isinstance(content, list) and content)
    may_be_silent = message["role"] == "assistant" and content in (None, [])
    if not is_said and not may_be_silent:
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
        drop_nulls(call)
        check_keys(here, call, {"id", "type", "function", "index"})
        if call.get("type") != "function":
            raise errors.InvalidRequestError(
                f'{here}.type must be "function", got {shown(call.get("type"))}.', param=f"{here}.type"
            )
        require_a_text(f"{here}.id", call.get("id"))
        function = call.get("function")
        if isinstance(function, dict):
            drop_nulls(function)
            drop_keys(function, _PARSED_ARGUMENTS)
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
        drop_nulls(part)
        check_keys(here, part, {"type", "text", *(_OUTPUT_TEXT_KEYS if "output_text" in kinds else ())})


def _check_input_item(place: str, item: dict[str, Any]) -> None:
    """An item of the input of /v1/responses, which may be an item of an earlier output."""
    kind = "message" if item.get("type") is None else item["type"]
    if not isinstance(kind, str) or kind not in _ITEM_KEYS:
        raise _unknown_item(place, kind)
    drop_nulls(item)
    if kind in ("function_call", "function_call_output"):
        drop_keys(item, *(name for name, usual in _USUAL_CALL.items() if shown(item.get(name)) == shown(usual)))
    if kind == "function_call":
        drop_keys(item, _PARSED_ARGUMENTS)
    check_keys(place, item, _ITEM_KEYS[kind])
    require_a_text(f"{place}.id", item.get("id", ""))
    if item.get("status", "completed") not in _STATUSES:
        raise errors.InvalidRequestError(
            f"{place}.status is {shown(item['status'])}; allowed are {', '.join(_STATUSES)}.", param=f"{place}.status"
        )
    match kind:
        case "message":
            _check_input_message(place, item)
        case "function_call":
            require_a_text(f"{place}.call_id", item.get("call_id"))
            _check_arguments(f"{place}.arguments", item.get("arguments"))
        case "function_call_output":
            _check_output(place, item)
        case "reasoning":
            _check_content(f"{place}.summary", item.get("summary"), ("summary_text",))
            _check_content(f"{place}.content", item.get("content"), ("reasoning_text",))


def _unknown_item(place: str, kind: Any) -> errors.InvalidRequestError:
    if kind == "item_reference":
        return errors.InvalidRequestError(
            f"{place} refers to an item that was stored, and nothing is stored here. Send the item itself; the Vercel "
            "AI SDK does so with store: false.",
            param=f"{place}.type",
        )
    return errors.InvalidRequestError(
        f"{place}.type is {shown(kind)}; allowed are {', '.join(_ITEM_KEYS)}.", param=f"{place}.type"
    )


def _check_input_message(place: str, item: dict[str, Any]) -> None:
    is_said_before = _role(place, item, _INPUT_ROLES) == "assistant"
    content = item.get("content")
    _check_content(f"{place}.content", content, ("output_text", "input_text") if is_said_before else ("input_text",))
    _require_content(place, item)
    if not is_said_before or not isinstance(content, list):
        return
    if len(content) != 1:
        raise errors.InvalidRequestError(
            f"{place}.content has {len(content)} parts; an assistant's message has one.", param=place
        )
    # vLLM knows an answer only by its type, and reads its text alone. The log probabilities and annotations that stood
    # with it would cost pydantic seconds of the event loop: four faults for each entry of a wrong form.
    item["type"] = "message"
    item["content"] = [{"type": "output_text", "text": content[0]["text"], "annotations": []}]


def _check_output(place: str, item: dict[str, Any]) -> None:
    """Of a tool."""
    place, output = f"{place}.output", item.get("output")
    if isinstance(output, list) and output:
        _check_content(place, output, ("input_text",))
        # As vLLM joins the parts of a tool's message in a chat.
        item["output"] = "\n".join(part["text"] for part in output)
    elif not isinstance(output, str):
        raise errors.InvalidRequestError(
            f"{place} must be a text or a list with texts, got {shown(output)}.", param=place
        )
