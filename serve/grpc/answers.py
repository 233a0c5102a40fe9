"""From answers to protobuf: bare pieces on the fast path, OpenAI's objects where vLLM's serving classes made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from capo_proto.v1 import inference_pb2 as pb
from serve.engine_api import Call, Piece

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


def usage_of(call: Call) -> pb.Usage:
    return pb.Usage(prompt_tokens=call.prompt_tokens, completion_tokens=call.completion_tokens)


# -- bare pieces: one of these runs for every token ------------------------------------------------------------------


def chat_piece(answer_id: str, model: str, piece: Piece) -> pb.ChatChunk:
    chunk = pb.ChatChunk(
        id=answer_id, model=model, index=piece.index, content=piece.text, num_tokens=len(piece.token_ids)
    )
    if piece.finish_reason is not None:
        _set_end(chunk, piece.finish_reason, piece.stop_reason)
    return chunk


def completion_piece(answer_id: str, model: str, piece: Piece) -> pb.CompletionChunk:
    chunk = pb.CompletionChunk(id=answer_id, model=model, index=piece.index, text=piece.text, token_ids=piece.token_ids)
    if piece.finish_reason is not None:
        _set_end(chunk, piece.finish_reason, piece.stop_reason)
    return chunk


def completion_choice(piece: Piece) -> pb.CompletionChoice:
    """A whole answer that came as one piece."""
    choice = pb.CompletionChoice(index=piece.index, text=piece.text, token_ids=piece.token_ids)
    _set_end(choice, piece.finish_reason, piece.stop_reason)
    return choice


# -- OpenAI's objects ------------------------------------------------------------------------------------------------


def chat_response(answer_id: str, answer: Mapping[str, Any]) -> pb.ChatResponse:
    """From a ``chat.completion``."""
    response = pb.ChatResponse(
        id=answer_id,
        model=answer["model"],
        usage=_usage(answer["usage"]),
        prompt_token_ids=answer.get("prompt_token_ids") or (),
        prompt_logprobs=_prompt_logprobs(answer.get("prompt_logprobs")),
    )
    for given in answer["choices"]:
        choice = response.choices.add(
            index=given["index"],
            message=_message(given["message"]),
            logprobs=_chat_logprobs(given.get("logprobs")),
            token_ids=given.get("token_ids") or (),
        )
        _set_end(choice, given["finish_reason"], given.get("stop_reason"))
    return response


def chat_chunks(answer_id: str, event: Mapping[str, Any], *, with_token_ids: bool) -> Iterator[pb.ChatChunk]:
    """From a ``chat.completion.chunk`` that carries token ids, which are sent on only ``with_token_ids``."""
    model = event["model"]
    if event.get("usage") is not None:
        yield pb.ChatChunk(id=answer_id, model=model, usage=_usage(event["usage"]))
    for given in event["choices"]:
        delta, token_ids = given["delta"], given.get("token_ids") or ()
        chunk = pb.ChatChunk(
            id=answer_id,
            model=model,
            index=given["index"],
            content=delta.get("content") or "",
            reasoning=delta.get("reasoning") or "",
            num_tokens=len(token_ids),
            logprobs=_chat_logprobs(given.get("logprobs")),
        )
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            chunk.tool_calls.add(
                index=call["index"],
                id=call.get("id") or "",
                name=function.get("name") or "",
                arguments=function.get("arguments") or "",
            )
        if with_token_ids:
            chunk.token_ids.extend(token_ids)
            chunk.prompt_token_ids.extend(event.get("prompt_token_ids") or ())
        _set_end(chunk, given.get("finish_reason"), given.get("stop_reason"))
        # vLLM begins every choice with the role alone, which is always the assistant's.
        has_more = delta.keys() - {"role", "content"} or chunk.finish_reason or chunk.prompt_token_ids
        if chunk.content or token_ids or has_more:
            yield chunk


def completion_response(answer_id: str, answer: Mapping[str, Any]) -> pb.CompletionResponse:
    """From a ``text_completion``."""
    response = pb.CompletionResponse(id=answer_id, model=answer["model"], usage=_usage(answer["usage"]))
    for given in answer["choices"]:
        choice = response.choices.add(
            index=given["index"],
            text=given["text"],
            token_ids=given.get("token_ids") or (),
            logprobs=_completion_logprobs(given.get("logprobs")),
            prompt_token_ids=given.get("prompt_token_ids") or (),
            prompt_logprobs=_prompt_logprobs(given.get("prompt_logprobs")),
        )
        _set_end(choice, given["finish_reason"], given.get("stop_reason"))
    return response


def completion_chunks(
    answer_id: str, event: Mapping[str, Any], *, with_prompt_token_ids: bool
) -> Iterator[pb.CompletionChunk]:
    """From a streamed ``text_completion``."""
    model = event["model"]
    if event.get("usage") is not None:
        yield pb.CompletionChunk(id=answer_id, model=model, usage=_usage(event["usage"]))
    for given in event["choices"]:
        chunk = pb.CompletionChunk(
            id=answer_id,
            model=model,
            index=given["index"],
            text=given["text"],
            token_ids=given.get("token_ids") or (),
            logprobs=_completion_logprobs(given.get("logprobs")),
        )
        if with_prompt_token_ids:
            chunk.prompt_token_ids.extend(given.get("prompt_token_ids") or ())
        _set_end(chunk, given.get("finish_reason"), given.get("stop_reason"))
        yield chunk


def _set_end(message: Any, finish_reason: str | None, stop_reason: int | str | None) -> None:
    message.finish_reason = _FINISH_REASONS[finish_reason]
    if isinstance(stop_reason, str):
        message.stop_string = stop_reason
    elif stop_reason is not None:
        message.stop_token_id = stop_reason


def _usage(usage: Mapping[str, Any]) -> pb.Usage:
    return pb.Usage(prompt_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"])


def _message(message: Mapping[str, Any]) -> pb.Message:
    calls = [
        pb.ToolCall(id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"])
        for call in message.get("tool_calls") or ()
    ]
    return pb.Message(
        role=message["role"], content=message.get("content"), reasoning=message.get("reasoning"), tool_calls=calls
    )


def _chat_logprobs(logprobs: Mapping[str, Any] | None) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token=entry["token"],
            logprob=entry["logprob"],
            bytes=_bytes(entry.get("bytes")),
            top=[
                pb.TopLogprob(token=top["token"], logprob=top["logprob"], bytes=_bytes(top.get("bytes")))
                for top in entry.get("top_logprobs") or ()
            ],
        )
        for entry in (logprobs or {}).get("content") or ()
    ]


def _bytes(values: Sequence[int] | None) -> bytes | None:
    return None if values is None else bytes(values)


def _completion_logprobs(logprobs: Mapping[str, Any] | None) -> list[pb.TokenLogprob]:
    """From OpenAI's older form, which is four parallel lists."""
    if logprobs is None:
        return []
    columns = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"))
    return [
        pb.TokenLogprob(
            token=token,
            logprob=logprob,
            top=[pb.TopLogprob(token=name, logprob=value) for name, value in (top or {}).items()],
            text_offset=offset,
        )
        for token, logprob, top, offset in zip(*columns, strict=True)
    ]


def _prompt_logprobs(places: Sequence[Mapping[str, Any] | None] | None) -> list[pb.PromptLogprobs]:
    return [
        pb.PromptLogprobs(
            tokens=[
                pb.PromptLogprob(
                    token_id=int(token_id),
                    logprob=entry["logprob"],
                    rank=entry.get("rank"),
                    decoded_token=entry.get("decoded_token"),
                )
                for token_id, entry in (place or {}).items()
            ]
        )
        for place in places or ()
    ]
