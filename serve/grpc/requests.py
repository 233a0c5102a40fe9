"""From protobuf requests to OpenAI's request bodies, which the core speaks and the request policy checks."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from capo_proto.v1 import inference_pb2 as pb
from registry import errors
from registry.strict_json import parse_strict_json

# Fields that are called the same in the body and are sent when they are set.
_SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "min_tokens", "include_stop_str_in_output", "skip_special_tokens",
    "spaces_between_special_tokens", "add_special_tokens", "truncate_prompt_tokens", "prompt_logprobs",
    "return_token_ids", "user",
)  # fmt: skip
_SAMPLING_LISTS = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")
_CHAT = (
    "parallel_tool_calls", "logprobs", "top_logprobs", "reasoning_effort", "add_generation_prompt",
    "continue_final_message",
)  # fmt: skip
_COMPLETION = ("logprobs", "echo", "suffix")
_TOOL_CHOICES = {
    pb.TOOL_CHOICE_NONE: "none",
    pb.TOOL_CHOICE_AUTO: "auto",
    pb.TOOL_CHOICE_REQUIRED: "required",
}


def chat_body(request: pb.ChatRequest, *, stream: bool) -> dict[str, Any]:
    """The request as the body of ``/v1/chat/completions``.

    Raises:
        InvalidRequestError: JSON text within the request is no JSON, or an enum has a value that is none of its own.
    """
    body = {"model": request.model, "stream": stream, **_sampling(request.sampling), **_given(request, _CHAT)}
    body["messages"] = [_message(message) for message in request.messages]
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    match request.WhichOneof("choice_of_tool"):
        case "tool_choice_function":
            body["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice_function}}
        case "tool_choice" if request.tool_choice != pb.TOOL_CHOICE_UNSPECIFIED:
            body["tool_choice"] = _tool_choice(request.tool_choice)
    return body


def completion_body(request: pb.CompletionRequest, *, stream: bool) -> dict[str, Any]:
    """The request as the body of ``/v1/completions``.

    Raises:
        InvalidRequestError: JSON text within the request is no JSON.
    """
    body = {"model": request.model, "stream": stream, **_sampling(request.sampling), **_given(request, _COMPLETION)}
    match request.WhichOneof("input"):
        case "prompt":
            body["prompt"] = request.prompt
        case "prompt_token_ids":
            body["prompt"] = list(request.prompt_token_ids.ids)
        case "prompts":
            body["prompt"] = list(request.prompts.texts)
        case "token_id_prompts":
            body["prompt"] = [list(prompt.ids) for prompt in request.token_id_prompts.prompts]
    return body


def refuse_unknown_fields(message: Message) -> None:
    """Protobuf passes over fields of a newer or a wrong definition in silence; nothing may be accepted and ignored.

    Raises:
        InvalidRequestError: ``message`` or one within it has a field that its definition here lacks.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise errors.InvalidRequestError(
            f"Field number {unknown[0].field_number} of {message.DESCRIPTOR.full_name} is not known here. "
            "Server reflection shows the fields that are.",
            code="unknown_field",
        )
    for inner in _messages_within(message):
        refuse_unknown_fields(inner)


def _messages_within(message: Message) -> Iterator[Message]:
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if isinstance(value, Message):
            yield value
        else:
            yield from value


def _sampling(sampling: pb.Sampling) -> dict[str, Any]:
    body = _given(sampling, _SAMPLING)
    for name in _SAMPLING_LISTS:
        if values := getattr(sampling, name):
            body[name] = list(values)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): _number("logit_bias", bias) for token, bias in sampling.logit_bias.items()}
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    return {**body, **_structure(sampling)}


def _structure(sampling: pb.Sampling) -> dict[str, Any]:
    match sampling.WhichOneof("structure"):
        case "json_schema":
            schema = _json("json_schema", sampling.json_schema)
            return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}
        case "json_object" if sampling.json_object:
            return {"response_format": {"type": "json_object"}}
        case "choice":
            return {"structured_outputs": {"choice": list(sampling.choice.texts)}}
        case "regex" | "grammar" as kind:
            return {"structured_outputs": {kind: getattr(sampling, kind)}}
    return {}


def _given(message: Message, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(message, name) for name in names if message.HasField(name)}
    return {name: _number(name, value) if isinstance(value, float) else value for name, value in values.items()}


def _number(field: str, value: float) -> float:
    """The shortest number that a 32-bit ``value`` may stand for: 0.7, as over HTTP, and not 0.699999988079071.

    Raises:
        InvalidRequestError: it is none, which JSON cannot say and the sampler would not survive.
    """
    if not math.isfinite(value):
        raise errors.InvalidRequestError(f"{field} is {value}; send a finite number.", param=field)
    for digits in range(6, 10):
        candidate = float(f"{value:.{digits}g}")
        if abs(candidate) < 3.4e38 and struct.unpack("f", struct.pack("f", candidate))[0] == value:
            return candidate
    return value


def _tool_choice(choice: pb.ToolChoice) -> str:
    if choice not in _TOOL_CHOICES:
        raise errors.InvalidRequestError(
            f"tool_choice is {choice}; allowed are 0 (not set), 1 (none), 2 (auto) and 3 (required).",
            param="tool_choice",
        )
    return _TOOL_CHOICES[choice]


def _message(message: pb.Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, **_given(message, ("content", "name", "tool_call_id", "reasoning"))}
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return body


def _tool(tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, **_given(tool, ("description", "strict"))}
    if tool.parameters:
        function["parameters"] = _json("tools.parameters", tool.parameters)
    return {"type": "function", "function": function}


def _json(field: str, text: str) -> Any:
    try:
        value = parse_strict_json(text.encode())
        json.dumps(value, ensure_ascii=False).encode()  # fails on the lone half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise errors.InvalidRequestError(f"{field} is not valid JSON: {error}.", param=field) from error
    return value
