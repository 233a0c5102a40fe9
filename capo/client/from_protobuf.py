"""From protobuf answers to typed results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from capo.client.options import Message, ToolCall
from capo.client.results import (
    Adapter,
    Alias,
    Canary,
    ChatAnswer,
    ChatChoice,
    ChatPiece,
    CompletionAnswer,
    CompletionChoice,
    CompletionPiece,
    FinishReason,
    Model,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from capo_proto.v1 import adapters_pb2, inference_pb2

_FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    inference_pb2.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}


def chat_answer(response: inference_pb2.ChatResponse) -> ChatAnswer:
    return ChatAnswer(
        id=response.id,
        model=response.model,
        choices=tuple(
            ChatChoice(
                index=choice.index,
                message=_message(choice.message),
                finish_reason=_FINISH_REASONS.get(choice.finish_reason),
                stop_reason=_stop_reason(choice),
                logprobs=_logprobs(choice.logprobs),
                token_ids=tuple(choice.token_ids),
            )
            for choice in response.choices
        ),
        usage=_usage(response.usage),
        prompt_token_ids=tuple(response.prompt_token_ids),
        prompt_logprobs=_prompt_logprobs(response.prompt_logprobs),
    )


def chat_piece(chunk: inference_pb2.ChatChunk) -> ChatPiece:
    return ChatPiece(
        id=chunk.id,
        model=chunk.model,
        index=chunk.index,
        text=chunk.content,
        reasoning=chunk.reasoning,
        tool_calls=tuple(
            ToolCallDelta(index=call.index, id=call.id, name=call.name, arguments=call.arguments)
            for call in chunk.tool_calls
        ),
        finish_reason=_FINISH_REASONS.get(chunk.finish_reason),
        stop_reason=_stop_reason(chunk),
        num_tokens=chunk.num_tokens,
        logprobs=_logprobs(chunk.logprobs),
        token_ids=tuple(chunk.token_ids),
        prompt_token_ids=tuple(chunk.prompt_token_ids),
        usage=_usage(chunk.usage) if chunk.HasField("usage") else None,
    )


def completion_answer(response: inference_pb2.CompletionResponse) -> CompletionAnswer:
    return CompletionAnswer(
        id=response.id,
        model=response.model,
        choices=tuple(
            CompletionChoice(
                index=choice.index,
                text=choice.text,
                finish_reason=_FINISH_REASONS.get(choice.finish_reason),
                stop_reason=_stop_reason(choice),
                token_ids=tuple(choice.token_ids),
                logprobs=_logprobs(choice.logprobs),
                prompt_token_ids=tuple(choice.prompt_token_ids),
                prompt_logprobs=_prompt_logprobs(choice.prompt_logprobs),
            )
            for choice in response.choices
        ),
        usage=_usage(response.usage),
    )


def completion_piece(chunk: inference_pb2.CompletionChunk) -> CompletionPiece:
    return CompletionPiece(
        id=chunk.id,
        model=chunk.model,
        index=chunk.index,
        text=chunk.text,
        finish_reason=_FINISH_REASONS.get(chunk.finish_reason),
        stop_reason=_stop_reason(chunk),
        token_ids=tuple(chunk.token_ids),
        logprobs=_logprobs(chunk.logprobs),
        prompt_token_ids=tuple(chunk.prompt_token_ids),
        usage=_usage(chunk.usage) if chunk.HasField("usage") else None,
    )


def model(message: inference_pb2.Model) -> Model:
    return Model(message.id, message.revision or None, message.parent or None, message.created_at)


def adapter(message: adapters_pb2.Adapter) -> Adapter:
    state = adapters_pb2.AdapterState.Name(message.state).removeprefix("ADAPTER_STATE_").lower()
    return Adapter(
        name=message.name,
        revision=message.revision,
        state=state,
        reason_code=message.reason_code,
        reason=message.reason,
        aliases=tuple(message.aliases),
        canary_of=tuple(message.canary_of),
        rank=message.rank,
        created_at=message.created_at,
        requests_in_flight=message.requests_in_flight,
        is_pinned=message.pinned,
    )


def alias(message: adapters_pb2.Alias) -> Alias:
    canary = Canary(message.canary.revision, message.canary.percent) if message.HasField("canary") else None
    return Alias(message.alias, message.revision, message.write_once, message.updated_at, canary)


def _usage(usage: inference_pb2.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.completion_tokens)


def _message(message: inference_pb2.Message) -> Message:
    return Message(
        role=message.role,
        content=message.content if message.HasField("content") else None,
        tool_calls=tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls),
        reasoning=message.reasoning if message.HasField("reasoning") else None,
    )


def _stop_reason(part: Any) -> str | int | None:
    match part.WhichOneof("stop_reason"):
        case "stop_string":
            return str(part.stop_string)
        case "stop_token_id":
            return int(part.stop_token_id)
    return None


def _logprobs(logprobs: Iterable[inference_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token=entry.token,
            logprob=entry.logprob if entry.HasField("logprob") else None,
            bytes=entry.bytes if entry.HasField("bytes") else None,
            top=tuple(
                TopLogprob(top.token, top.logprob, top.bytes if top.HasField("bytes") else None) for top in entry.top
            ),
            text_offset=entry.text_offset if entry.HasField("text_offset") else None,
        )
        for entry in logprobs
    )


def _prompt_logprobs(places: Iterable[inference_pb2.PromptLogprobs]) -> PromptLogprobs:
    return tuple(
        {
            token.token_id: PromptLogprob(
                token.logprob,
                token.rank if token.HasField("rank") else None,
                token.decoded_token if token.HasField("decoded_token") else None,
            )
            for token in place.tokens
        }
        for place in places
    )
