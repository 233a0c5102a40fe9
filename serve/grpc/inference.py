"""The ``capo.v1.Inference`` service."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import grpc

from capo_proto.v1 import inference_pb2 as pb
from capo_proto.v1 import inference_pb2_grpc as stubs
from registry.principal import current_principal
from serve import faces
from serve.engine_api import Call, Endpoint
from serve.grpc import answers
from serve.grpc.requests import chat_body, completion_body
from serve.model_list import callable_models
from serve.request_counts import counted
from serve.request_policy import check_body
from serve.service import Origin, ServingService

_PROTOCOL = "grpc"


class InferenceServicer(stubs.InferenceServicer):
    """Errors pass through: the server's interceptor turns them into status codes.

    Streams take the engine's bare pieces, without JSON, unless the answer has parts that only vLLM's serving classes
    make: tool calls, reasoning, log probabilities, echoes.
    """

    def __init__(self, service: ServingService) -> None:
        self._service = service

    async def Chat(self, request: pb.ChatRequest, context: grpc.aio.ServicerContext) -> pb.ChatResponse:
        with counted(self._service.metrics, _PROTOCOL):
            body = check_body(chat_body(request, stream=False), Endpoint.CHAT)
            answer = json.loads(await self._service.complete(Endpoint.CHAT, body, _origin(context)))
            return answers.chat_response(_chat_id(), answer)

    async def ChatStream(
        self, request: pb.ChatRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.ChatChunk, None]:
        with counted(self._service.metrics, _PROTOCOL):
            body = check_body(chat_body(request, stream=True), Endpoint.CHAT)
            answer_id = _chat_id()
            if self._service.engine.parses_chat or _needs_serving_classes(body):
                with_token_ids = bool(body.get("return_token_ids"))
                # Token ids say how many tokens a piece stands for.
                body |= {"return_token_ids": True, "stream_options": {"include_usage": True}}
                async with contextlib.aclosing(self._events(Endpoint.CHAT, body, context)) as events:
                    async for event in events:
                        for chunk in answers.chat_chunks(answer_id, event, with_token_ids=with_token_ids):
                            yield chunk
                return
            call: Call | None = None
            async with contextlib.aclosing(self._service.pieces(Endpoint.CHAT, body, _origin(context))) as pieces:
                async for call, piece in pieces:
                    yield answers.chat_piece(answer_id, call.answer_model, piece)
            if call is not None:
                yield pb.ChatChunk(id=answer_id, model=call.answer_model, usage=answers.usage_of(call))

    async def Complete(self, request: pb.CompletionRequest, context: grpc.aio.ServicerContext) -> pb.CompletionResponse:
        with counted(self._service.metrics, _PROTOCOL):
            body = check_body(completion_body(request, stream=False), Endpoint.COMPLETION)
            answer_id = _completion_id()
            if _needs_serving_classes(body):
                body |= _answer_token_ids(body)
                answer = json.loads(await self._service.complete(Endpoint.COMPLETION, body, _origin(context)))
                return answers.completion_response(answer_id, answer)
            response = pb.CompletionResponse(id=answer_id)
            async with contextlib.aclosing(self._service.pieces(Endpoint.COMPLETION, body, _origin(context))) as pieces:
                async for call, piece in pieces:
                    response.model = call.answer_model
                    response.usage.CopyFrom(answers.usage_of(call))
                    response.choices.append(answers.completion_choice(piece))
            return response

    async def CompleteStream(
        self, request: pb.CompletionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.CompletionChunk, None]:
        with counted(self._service.metrics, _PROTOCOL):
            body = check_body(completion_body(request, stream=True), Endpoint.COMPLETION)
            answer_id = _completion_id()
            if _needs_serving_classes(body):
                is_asked_for_ids = bool(body.get("return_token_ids"))
                body |= {**_answer_token_ids(body), "stream_options": {"include_usage": True}}
                async with contextlib.aclosing(self._events(Endpoint.COMPLETION, body, context)) as events:
                    async for event in events:
                        for chunk in answers.completion_chunks(
                            answer_id, event, with_prompt_token_ids=is_asked_for_ids
                        ):
                            yield chunk
                return
            call: Call | None = None
            async with contextlib.aclosing(self._service.pieces(Endpoint.COMPLETION, body, _origin(context))) as pieces:
                async for call, piece in pieces:
                    yield answers.completion_piece(answer_id, call.answer_model, piece)
            if call is not None:
                yield pb.CompletionChunk(id=answer_id, model=call.answer_model, usage=answers.usage_of(call))

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        response = pb.ListModelsResponse()
        for model in await callable_models(self._service.catalog, current_principal()):
            response.models.add(
                id=model.name, revision=model.revision, parent=model.parent, created_at=model.created_at
            )
        return response

    async def _events(
        self, endpoint: Endpoint, body: Mapping[str, Any], context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The payloads of the serving classes' server-sent events."""
        async with contextlib.aclosing(self._service.stream(endpoint, body, _origin(context))) as events:
            async for event in events:
                payload = event.removeprefix("data: ").strip()
                if payload != "[DONE]":
                    yield json.loads(payload)


def _needs_serving_classes(body: Mapping[str, Any]) -> bool:
    """Whether the answer has parts that bare pieces lack, or answers several prompts, which pieces take in turn."""
    if any(body.get(field) for field in ("tools", "echo", "return_token_ids")):
        return True
    # Chat's logprobs is a truth value; a completion's is a number, and 0 asks for something.
    if body.get("logprobs", False) is not False or "prompt_logprobs" in body:
        return True
    prompt = body.get("prompt")
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)


def _answer_token_ids(body: Mapping[str, Any]) -> dict[str, Any]:
    # With echo vLLM gives token ids instead of the echoed text.
    return {} if body.get("echo") else {"return_token_ids": True}


def _chat_id() -> str:
    return f"chatcmpl-{faces.current_request_id.get()}"


def _completion_id() -> str:
    return f"cmpl-{faces.current_request_id.get()}"


def _origin(context: grpc.aio.ServicerContext) -> Origin:
    metadata = dict(context.invocation_metadata() or ())
    return Origin(
        _PROTOCOL,
        faces.current_request_id.get(),
        {name: str(metadata[name]) for name in faces.TRACE_HEADERS if name in metadata},
    )
