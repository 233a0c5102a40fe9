"""A conversation and its tools in the form in which vLLM 0.32 hands them to a chat template.

Serving goes through vllm/renderers/chat_utils.py (``parse_chat_messages``) and vllm/renderers/hf.py
(``safe_apply_chat_template``); training follows them here, so that both render the same prompt.
``tests/tune/test_served_form.py`` compares the two for many templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tune.data.content_format import walks_over_parts

JsonObject = dict[str, Any]


def served_messages(messages: Sequence[JsonObject], template: str) -> list[JsonObject]:
    """``messages`` as ``template`` gets them: contents as texts or as parts, ``developer`` only where it is known."""
    as_parts = walks_over_parts(template)
    served = [_message(message, as_parts=as_parts) for message in messages]
    if any(message["role"] == "developer" for message in served) and not _knows_developer(template):
        return _with_one_system_message(served)
    return served


def served_tools(tools: Sequence[JsonObject] | None) -> list[JsonObject] | None:
    """Every key in the order of vLLM's model of a tool, and null where the row says nothing."""
    return None if tools is None else [{"type": "function", "function": _function(tool["function"])} for tool in tools]


def texts_of_content(content: str | Sequence[JsonObject]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def joined_content(content: str | Sequence[JsonObject]) -> str:
    """As one text, as vLLM joins the parts."""
    return "\n".join(texts_of_content(content))


def _message(message: JsonObject, *, as_parts: bool) -> JsonObject:
    content: object = joined_content(message["content"])
    if as_parts and message["role"] != "tool":
        content = [{"type": "text", "text": text} for text in texts_of_content(message["content"])]
    served = {"role": message["role"], "content": content}
    if "tool_calls" in message:
        served["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    if "reasoning" in message:
        served["reasoning"] = served["reasoning_content"] = message["reasoning"]
    served |= {key: message[key] for key in ("tool_call_id", "name") if key in message}
    if message["role"] == "developer":
        served["tools"] = None
    return served


def _call(call: JsonObject) -> JsonObject:
    """Keys in the order of OpenAI's types, by which the request is read: templates may write them all."""
    function = {"arguments": call["function"]["arguments"], "name": call["function"]["name"]}
    return {"id": call["id"], "function": function, "type": "function"}


def _function(function: JsonObject) -> JsonObject:
    served = {key: function.get(key) for key in ("name", "description", "parameters")}
    return served if function.get("strict") is None else {**served, "strict": function["strict"]}


def _knows_developer(template: str) -> bool:
    return "'developer'" in template or '"developer"' in template


def _with_one_system_message(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """``developer`` read as ``system``, and all system messages joined into one in front."""
    renamed = [_as_system(message) for message in messages]
    if all(message["role"] != "system" for message in renamed[1:]):
        return renamed
    contents = [joined_content(message["content"]) for message in renamed if message["role"] == "system"]
    system = {"role": "system", "content": "\n\n".join(content for content in contents if content)}
    return [system, *(message for message in renamed if message["role"] != "system")]


def _as_system(message: JsonObject) -> JsonObject:
    if message["role"] != "developer":
        return message
    return {key: value for key, value in message.items() if key != "tools"} | {"role": "system"}
