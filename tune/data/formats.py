"""Row formats that people have, each turned into the one form that training reads.

    chat               {messages, tools, parallel_tool_calls}: OpenAI's, with weight and tool calls
    prompt-completion  {prompt, completion}: two texts, or two lists of messages (TRL's conversational form)
    alpaca             {instruction, input, output, system, history} (Stanford Alpaca; history is LLaMA-Factory's)
    sharegpt           {conversations: [{from, value}], system, tools} (Vicuna's; tool turns as LLaMA-Factory has them)
    preference         see tune.data.preferences
    text               {text}

Every form but the last becomes chat rows, so the checks of ``tune.data.messages`` hold for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias, get_args

from registry.strict_json import parse_strict_json
from tune.data.faults import RowFault, row_fault
from tune.data.messages import unknown_key_reason
from tune.data.preferences import PreferenceRow, check_preference_object
from tune.data.rows import ChatRow, JsonObject, TextRow, check_chat_object, check_text_object

Format: TypeAlias = Literal["chat", "prompt-completion", "alpaca", "sharegpt", "preference", "text"]
FORMATS: tuple[Format, ...] = get_args(Format)
AnyRow: TypeAlias = ChatRow | TextRow | PreferenceRow

_ROLE_OF_SPEAKER = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "function_call",
    "tool_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


def detect_format(row: JsonObject) -> Format | None:
    """The format that a row's keys belong to; ``None`` where they belong to none."""
    keys = row.keys()
    if "messages" in keys:
        return "chat"
    if "conversations" in keys or "conversation" in keys:
        return "sharegpt"
    if keys & {"chosen", "rejected", "preferred_output", "non_preferred_output"}:
        return "preference"
    if "instruction" in keys:
        return "alpaca"
    if "prompt" in keys and "completion" in keys:
        return "prompt-completion"
    return "text" if "text" in keys else None


def parse_object(row: JsonObject, line: int, form: Format) -> AnyRow:
    """A decoded row of a known format, checked.

    Raises:
        RowFault: what is wrong with it; a row of another known format is called that.
    """
    found = detect_format(row)
    if found is not None and found != form and form not in ("chat", "text"):  # those two say it in their own words
        raise row_fault(
            line, f"this is a {found} row in a {form} file; a file holds rows of one format", "mixed_formats"
        )
    if form == "chat" and found in ("sharegpt", "alpaca"):
        raise row_fault(line, f"this is a {found} row in a chat file; a file holds rows of one format", "mixed_formats")
    return _PARSERS[form](row, line)


def _parse_prompt_completion(row: JsonObject, line: int) -> ChatRow:
    _check_keys(row, ("prompt", "completion", "tools"), line)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        messages = [_user(prompt, "prompt", line), _assistant(completion, "completion", line)]
        return _as_chat(messages, row.get("tools"), line)
    if isinstance(prompt, list) and isinstance(completion, list):
        read = [{**m, "weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in prompt]
        return _as_chat([*read, *completion], row.get("tools"), line)
    raise row_fault(
        line,
        "prompt and completion must be two texts or two lists of messages, got "
        f"{type(prompt).__name__} and {type(completion).__name__}",
        "content_type",
        "prompt",
    )


def _parse_alpaca(row: JsonObject, line: int) -> ChatRow:
    _check_keys(row, ("instruction", "input", "output", "system", "history"), line)
    for key in ("instruction", "input", "output", "system"):
        if not isinstance(row.get(key, ""), str):
            raise row_fault(line, f"{key} must be a text, got {type(row[key]).__name__}", "content_type", key)
    if "output" not in row:
        raise row_fault(line, "the row has no output, so there is nothing to learn", "nothing_to_learn", "output")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = row.get("history", [])
    if not isinstance(history, list):
        raise row_fault(
            line, f"history must be a list of pairs, got {type(history).__name__}", "content_type", "history"
        )
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise row_fault(line, f"history[{index}] must be [question, answer]", "content_type", "history")
        messages += [_user(pair[0], f"history[{index}]", line), _assistant(pair[1], f"history[{index}]", line)]
    parts = [part for part in (row["instruction"], row.get("input", "")) if part]
    messages += [_user("\n".join(parts), "instruction", line), _assistant(row["output"], "output", line)]
    return _as_chat(messages, None, line)


def _parse_sharegpt(row: JsonObject, line: int) -> ChatRow:
    _check_keys(row, ("conversations", "conversation", "system", "tools"), line)
    where = "conversations" if "conversations" in row else "conversation"
    turns = row.get(where)
    if not isinstance(turns, list) or not turns:
        raise row_fault(line, f"{where} must be a list with at least one turn", "messages_shape", where)
    messages: list[JsonObject] = []
    system = row.get("system")
    if system:
        if not isinstance(system, str):
            raise row_fault(line, f"system must be a text, got {type(system).__name__}", "content_type", "system")
        messages.append({"role": "system", "content": system})
    for index, turn in enumerate(turns):
        messages.append(_sharegpt_message(turn, index, messages, f"{where}[{index}]", line))
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _decoded_tools(tools, line)
    return _as_chat(messages, tools or None, line)


def _sharegpt_message(turn: object, index: int, before: list[JsonObject], where: str, line: int) -> JsonObject:
    if isinstance(turn, dict) and "role" in turn:  # the same list, with OpenAI's keys
        return turn
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        raise row_fault(line, f"{where} must be an object with from and value", "messages_shape", where)
    for key in turn:
        if key not in ("from", "value", "weight"):
            raise row_fault(
                line, f"{where}: {unknown_key_reason(key, ('from', 'value', 'weight'))}", "unknown_key", where
            )
    role = _ROLE_OF_SPEAKER.get(turn["from"])
    if role is None:
        near = get_close_matches(turn["from"][:80], _ROLE_OF_SPEAKER, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        reason = (
            f"{where} is from the unknown speaker {turn['from'][:80]!r}; {hint}allowed: {', '.join(_ROLE_OF_SPEAKER)}"
        )
        raise row_fault(line, reason, "unknown_role", where)
    value = turn.get("value")
    if not isinstance(value, str):
        raise row_fault(line, f"{where}.value must be a text, got {type(value).__name__}", "content_type", where)
    if not value.strip() and role != "tool":
        raise row_fault(line, f"{where}.value is empty", "empty_content", where)
    if role == "function_call":
        return {"role": "assistant", "tool_calls": _sharegpt_calls(value, index, where, line)}
    if role == "tool":
        call_id = _first_call_id(before[-1]) if before else None
        if call_id is None:
            reason = f"{where} answers a call, but no function_call comes before it (or tool_calls without an id)"
            raise row_fault(line, reason, "tool_order", where)
        return {"role": "tool", "content": value, "tool_call_id": call_id}
    weight = {"weight": turn["weight"]} if "weight" in turn else {}
    return {"role": role, "content": value, **weight}


def _first_call_id(message: JsonObject) -> str | None:
    """Of a message that may stand as it was given, with OpenAI's keys, and is not checked yet."""
    calls = message.get("tool_calls")
    first = calls[0] if isinstance(calls, list) and calls else None
    call_id = first.get("id") if isinstance(first, dict) else None
    return call_id if isinstance(call_id, str) else None


def _sharegpt_calls(value: str, index: int, where: str, line: int) -> list[JsonObject]:
    try:
        call: Any = parse_strict_json(value.encode("utf-8"))
        name, arguments = call["name"], call["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{where}.value must be the JSON object {{name, arguments}}: {error}"
        raise row_fault(line, reason, "tool_arguments", where) from error
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return [{"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": text}}]


def _decoded_tools(text: str, line: int) -> object:
    """LLaMA-Factory keeps the tools as a JSON text of bare functions."""
    if not text.strip():
        return None
    try:
        tools = parse_strict_json(text.encode("utf-8"))
    except ValueError as error:
        raise row_fault(line, f"tools is not valid JSON: {error}", "tool_definition", "tools") from error
    if not isinstance(tools, list):
        return tools
    is_bare = [isinstance(tool, dict) and "function" not in tool and "name" in tool for tool in tools]
    return [{"type": "function", "function": t} if bare else t for t, bare in zip(tools, is_bare, strict=True)]


def _as_chat(messages: list[JsonObject], tools: object, line: int) -> ChatRow:
    row: JsonObject = {"messages": messages}
    if tools is not None:
        row["tools"] = tools
    try:
        return check_chat_object(row, line)
    except RowFault as fault:
        reason = fault.message.removeprefix(f"line {line}: ")
        raise row_fault(line, f"read as chat messages: {reason}", fault.kind, fault.param) from fault


def _user(text: str, where: str, line: int) -> JsonObject:
    return {"role": "user", "content": _filled(text, where, line)}


def _assistant(text: str, where: str, line: int) -> JsonObject:
    return {"role": "assistant", "content": _filled(text, where, line)}


def _filled(text: str, where: str, line: int) -> str:
    if not text.strip():
        raise row_fault(line, f"{where} is empty", "empty_content", where)
    return text


def _check_keys(row: JsonObject, allowed: tuple[str, ...], line: int) -> None:
    for key in row:
        if key not in allowed:
            raise row_fault(line, unknown_key_reason(key, allowed), "unknown_key", key)


_PARSERS: dict[Format, Callable[[JsonObject, int], AnyRow]] = {
    "chat": check_chat_object,
    "prompt-completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
    "preference": check_preference_object,
    "text": check_text_object,
}
