"""The ``capo.v1.Inference`` service."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator

import grpc

from capo_proto.v1 import inference_pb2 as pb
from capo_proto.v1 import inference_pb2_grpc as stubs
from serve.engine_api import Call, Endpoint
from serve.grpc.convert import chat_body, chat_message, completion_body, finish_reason
from serve.request_policy import check_body
from serve.service import Origin, ServingService

_PROTOCOL = "grpc"


class InferenceServicer(stubs.InferenceServicer):
    """Errors pass through: the server's interceptor turns them into status codes."""

    def __init__(self, service: ServingService) -> None:
        self._service = service

    async def Chat(self, request: pb.ChatRequest, context: grpc.aio.ServicerContext) -> pb.ChatResponse:
        body = check_body(chat_body(request, stream=False), Endpoint.CHAT)
        # One piece either way, so the serving classes may do it: they also parse tool calls.
        answer = json.loads(await self._service.complete(Endpoint.CHAT, body, _origin(context)))
        choices = [
            pb.ChatChoice(
                index=choice["index"],
                message=chat_message(choice["message"]),
                finish_reason=finish_reason(choice["finish_reason"]),
            )
            for choice in answer["choices"]
        ]
        usage = pb.Usage(
            prompt_tokens=answer["usage"]["prompt_tokens"], completion_tokens=answer["usage"]["completion_tokens"]
        )
        return pb.ChatResponse(id=answer["id"], model=answer["model"], choices=choices, usage=usage)

    async def ChatStream(
        self, request: pb.ChatRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ChatChunk]:
        body = check_body(chat_body(request, stream=True), Endpoint.CHAT)
        call: Call | None = None
        async for call, piece in self._service.pieces(Endpoint.CHAT, body, _origin(context)):
            yield pb.ChatChunk(
                id=call.request_id,
                model=call.answer_model,
                index=piece.index,
                content=piece.text,
                num_tokens=len(piece.token_ids),
                finish_reason=finish_reason(piece.finish_reason),
            )
        if call is not None:
            yield pb.ChatChunk(id=call.request_id, model=call.answer_model, usage=_usage(call))

    async def Complete(self, request: pb.CompletionRequest, context: grpc.aio.ServicerContext) -> pb.CompletionResponse:
        body = check_body(completion_body(request, stream=False), Endpoint.COMPLETION)
        response = pb.CompletionResponse()
        async for call, piece in self._service.pieces(Endpoint.COMPLETION, body, _origin(context)):
            response.id, response.model = call.request_id, call.answer_model
            response.usage.CopyFrom(_usage(call))
            response.choices.add(
                index=piece.index,
                text=piece.text,
                finish_reason=finish_reason(piece.finish_reason),
                token_ids=piece.token_ids,
            )
        return response

    async def CompleteStream(
        self, request: pb.CompletionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.CompletionChunk]:
        body = check_body(completion_body(request, stream=True), Endpoint.COMPLETION)
        call: Call | None = None
        async for call, piece in self._service.pieces(Endpoint.COMPLETION, body, _origin(context)):
            yield pb.CompletionChunk(
                id=call.request_id,
                model=call.answer_model,
                index=piece.index,
                text=piece.text,
                finish_reason=finish_reason(piece.finish_reason),
                token_ids=piece.token_ids,
            )
        if call is not None:
            yield pb.CompletionChunk(id=call.request_id, model=call.answer_model, usage=_usage(call))


def _usage(call: Call) -> pb.Usage:
    return pb.Usage(prompt_tokens=call.prompt_tokens, completion_tokens=call.completion_tokens)


def _origin(context: grpc.aio.ServicerContext) -> Origin:
    metadata = dict(context.invocation_metadata() or ())
    return Origin(
        _PROTOCOL,
        metadata.get("x-request-id") or f"req-{secrets.token_hex(12)}",
        {name: str(metadata[name]) for name in ("traceparent", "tracestate") if name in metadata},
    )
