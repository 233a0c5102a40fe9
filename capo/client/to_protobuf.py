"""From the caller's options to protobuf requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from capo.client.messages import as_json, made, refused
from capo.client.options import (
    ChatOptions,
    Choice,
    CompletionOptions,
    Grammar,
    JsonObject,
    JsonSchema,
    Message,
    NamedTool,
    Regex,
    Sampling,
    Tool,
    ToolChoice,
)
from capo_proto.v1 import inference_pb2 as pb

Messages: TypeAlias = str | Sequence[Message]
"""A conversation, or one turn of the user's."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
"""Text or token ids; a list of either for several prompts at once."""

_TOOL_CHOICES = {
    ToolChoice.NONE: pb.TOOL_CHOICE_NONE,
    ToolChoice.AUTO: pb.TOOL_CHOICE_AUTO,
    ToolChoice.REQUIRED: pb.TOOL_CHOICE_REQUIRED,
}
_SAME_NAME = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "n", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "logit_bias", "min_tokens", "ignore_eos", "bad_words",
    "allowed_token_ids", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens",
    "add_special_tokens", "truncate_prompt_tokens", "prompt_logprobs", "return_token_ids", "user",
)  # fmt: skip


def chat_request(model: str, messages: Messages, sampling: Sampling, options: ChatOptions) -> pb.ChatRequest:
    turns = [Message("user", messages)] if isinstance(messages, str) else messages
    request = made(
        pb.ChatRequest,
        model=model,
        messages=[_message(turn) for turn in turns],
        sampling=_sampling(sampling),
        tools=[_tool(tool) for tool in options.tools],
        parallel_tool_calls=options.parallel_tool_calls,
        logprobs=options.logprobs,
        top_logprobs=options.top_logprobs,
        reasoning_effort=options.reasoning_effort,
        add_generation_prompt=options.add_generation_prompt,
        continue_final_message=options.continue_final_message,
    )
    match options.tool_choice:
        case NamedTool(name):
            request.MergeFrom(made(pb.ChatRequest, tool_choice_function=name))
        case ToolChoice() as choice:
            request.tool_choice = _TOOL_CHOICES[choice]
    return request


def completion_request(
    model: str, prompt: Prompt, sampling: Sampling, options: CompletionOptions
) -> pb.CompletionRequest:
    return made(
        pb.CompletionRequest,
        model=model,
        sampling=_sampling(sampling),
        logprobs=options.logprobs,
        echo=options.echo,
        suffix=options.suffix,
        **_input(prompt),
    )


def _input(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not isinstance(prompt, Sequence):
        raise refused(f"prompt is {prompt!r:.80}; a text, a list of texts, or token ids are allowed", "prompt")
    parts: list[Any] = list(prompt)
    if parts and isinstance(parts[0], str):
        return {"prompts": made(pb.Prompts, texts=parts)}
    if parts and not isinstance(parts[0], int):
        return {"token_id_prompts": pb.TokenIdPrompts(prompts=[made(pb.TokenIds, ids=ids) for ids in parts])}
    return {"prompt_token_ids": made(pb.TokenIds, ids=parts)}


def _sampling(sampling: Sampling) -> pb.Sampling:
    # Protobuf takes None as not set, and a text as a list of its letters.
    stop = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop
    return made(
        pb.Sampling, **{name: getattr(sampling, name) for name in _SAME_NAME}, stop=stop, **_structure(sampling)
    )


def _structure(sampling: Sampling) -> dict[str, Any]:
    match sampling.structure:
        case JsonSchema(schema):
            return {"json_schema": as_json("json_schema", schema)}
        case JsonObject():
            return {"json_object": True}
        case Regex(pattern):
            return {"regex": pattern}
        case Choice(texts):
            return {"choice": made(pb.Choices, texts=texts)}
        case Grammar(ebnf):
            return {"grammar": ebnf}
        case None:
            return {}


def _message(message: Message) -> pb.Message:
    if not isinstance(message, Message):
        raise refused(f"messages holds {message!r:.80}; each is a capo.client.Message", "messages")
    return made(
        pb.Message,
        role=message.role,
        content=message.content,
        name=message.name,
        tool_call_id=message.tool_call_id,
        tool_calls=[
            made(pb.ToolCall, id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls
        ],
        reasoning=message.reasoning,
    )


def _tool(tool: Tool) -> pb.Tool:
    parameters = "" if tool.parameters is None else as_json("parameters", tool.parameters)
    return made(pb.Tool, name=tool.name, description=tool.description, parameters=parameters, strict=tool.strict)
