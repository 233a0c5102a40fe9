"""Between protobuf messages and the request bodies and pieces that the core speaks."""

from __future__ import annotations

import json
from typing import Any

from capo_proto.v1 import inference_pb2 as pb
from registry import errors

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}
_PLAIN_SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "min_tokens",
)  # fmt: skip


def chat_body(request: pb.ChatRequest, *, stream: bool) -> dict[str, Any]:
    """The request as the body of ``/v1/chat/completions``; the HTTP face's policy then checks it alike."""
    body = {"model": request.model, "stream": stream, **_sampling(request.sampling)}
    body["messages"] = [_message(message) for message in request.messages]
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    return body


def completion_body(request: pb.CompletionRequest, *, stream: bool) -> dict[str, Any]:
    """The request as the body of ``/v1/completions``."""
    body = {"model": request.model, "stream": stream, **_sampling(request.sampling)}
    if request.WhichOneof("input") == "prompt_token_ids":
        body["prompt"] = list(request.prompt_token_ids.ids)
    else:
        body["prompt"] = request.prompt
    return body


def finish_reason(reason: str | None) -> pb.FinishReason:
    return _FINISH_REASONS[reason]


def chat_message(message: dict[str, Any]) -> pb.Message:
    """OpenAI's assistant message."""
    calls = [
        pb.ToolCall(id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"])
        for call in message.get("tool_calls") or []
    ]
    return pb.Message(role=message["role"], content=message.get("content") or "", tool_calls=calls)


def _sampling(sampling: pb.Sampling) -> dict[str, Any]:
    body: dict[str, Any] = {name: getattr(sampling, name) for name in _PLAIN_SAMPLING if sampling.HasField(name)}
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        body["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    if sampling.HasField("json_schema"):
        schema = _json("json_schema", sampling.json_schema)
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return body


def _message(message: pb.Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.HasField("name"):
        body["name"] = message.name
    if message.HasField("tool_call_id"):
        body["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return body


def _tool(tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    if tool.parameters:
        function["parameters"] = _json("tools.parameters", tool.parameters)
    return {"type": "function", "function": function}


def _json(field: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise errors.InvalidRequestError(f"{field} is not valid JSON: {error}.", param=field) from error
