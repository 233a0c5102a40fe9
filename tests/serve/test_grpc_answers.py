"""Answers over gRPC hold every part that vLLM's serving classes make: tool calls, reasoning, log probabilities, ids."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from capo_proto.v1 import inference_pb2 as pb
from serve.engine_api import Call
from tests.serve.fake_engine import FakeEngine
from tests.serve.grpc_channel import Faces, both_faces, chat
from tests.serve.running import BASE

CALL = {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}


async def stream_chat(faces: Faces, **fields: Any) -> list[pb.ChatChunk]:
    return [chunk async for chunk in faces.inference.ChatStream(chat(BASE, **fields))]


def completion(**fields: Any) -> pb.CompletionRequest:
    return pb.CompletionRequest(model=BASE, prompt="hello", **fields)


class ScriptedEngine(FakeEngine):
    """Gives the answers that it was made with, in the form of vLLM 0.32's serving classes."""

    def __init__(self, *, answer: dict[str, Any] | None = None, events: list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self._answer = answer
        self._events = events or []
        self.bodies: list[dict[str, Any]] = []

    async def complete(self, call: Call) -> bytes:
        self.bodies.append(dict(call.body))
        return json.dumps(self._answer).encode()

    async def stream(self, call: Call) -> AsyncGenerator[str, None]:
        self.bodies.append(dict(call.body))
        for event in self._events:
            yield f"data: {json.dumps({'model': call.answer_model, **event})}\n\n"
        yield "data: [DONE]\n\n"


class ParsingEngine(ScriptedEngine):
    @property
    def parses_chat(self) -> bool:
        return True


def event(delta: dict[str, Any], *, token_ids: list[int], index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": delta, "token_ids": token_ids, "finish_reason": None, **fields}]}


def call_delta(index: int, *, call_id: str | None = None, name: str | None = None, arguments: str = "") -> Any:
    return {"tool_calls": [{"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}}
TOOL_EVENTS = [
    event({"role": "assistant", "content": ""}, token_ids=[]) | {"prompt_token_ids": [1, 2, 3]},
    event({"content": "Let me see."}, token_ids=[10]),
    event(call_delta(0, call_id="call-1", name="look"), token_ids=[11]),
    event({}, token_ids=[12]),
    event(call_delta(0, arguments='{"a"'), token_ids=[13]),
    event(call_delta(0, arguments=": 1}"), token_ids=[14]),
    event(call_delta(1, call_id="call-2", name="look", arguments="{}"), token_ids=[15], finish_reason="tool_calls"),
    USAGE,
]


def joined_calls(chunks: list[pb.ChatChunk]) -> dict[int, tuple[str, str, str]]:
    calls: dict[int, tuple[str, str, str]] = {}
    for chunk in chunks:
        for delta in chunk.tool_calls:
            before = calls.get(delta.index, ("", "", ""))
            calls[delta.index] = (before[0] + delta.id, before[1] + delta.name, before[2] + delta.arguments)
    return calls


async def test_tool_calls_arrive_parsed_in_a_stream(tmp_path: Path) -> None:
    engine = ScriptedEngine(events=TOOL_EVENTS)
    async with both_faces(engine, tmp_path) as faces:
        chunks = await stream_chat(faces, tools=[pb.Tool(name="look")])
        assert joined_calls(chunks) == {0: ("call-1", "look", '{"a": 1}'), 1: ("call-2", "look", "{}")}
        assert "".join(chunk.content for chunk in chunks) == "Let me see."
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [pb.FINISH_REASON_TOOL_CALLS]
        assert sum(chunk.num_tokens for chunk in chunks) == chunks[-1].usage.completion_tokens == 6
        assert chunks[-1] == pb.ChatChunk(
            id=chunks[0].id, model=BASE, usage=pb.Usage(prompt_tokens=9, completion_tokens=6)
        )
        assert not any(chunk.token_ids or chunk.prompt_token_ids for chunk in chunks)


async def test_token_ids_come_in_a_stream_when_they_are_asked_for(tmp_path: Path) -> None:
    async with both_faces(ScriptedEngine(events=TOOL_EVENTS), tmp_path) as faces:
        chunks = await stream_chat(faces, sampling=pb.Sampling(return_token_ids=True))
        assert [token for chunk in chunks for token in chunk.token_ids] == [10, 11, 12, 13, 14, 15]
        assert list(chunks[0].prompt_token_ids) == [1, 2, 3]


async def test_a_model_with_a_parser_is_parsed_without_tools_too(tmp_path: Path) -> None:
    events = [event({"reasoning": "Hm."}, token_ids=[1]), event({"content": "Yes."}, token_ids=[2]), USAGE]
    async with both_faces(ParsingEngine(events=events), tmp_path) as faces:
        chunks = await stream_chat(faces)
        assert [(chunk.reasoning, chunk.content) for chunk in chunks] == [("Hm.", ""), ("", "Yes."), ("", "")]


async def test_a_plain_stream_needs_no_json(tmp_path: Path) -> None:
    engine = ScriptedEngine(events=[USAGE])
    async with both_faces(engine, tmp_path) as faces:
        chunks = await stream_chat(faces, sampling=pb.Sampling(temperature=0, json_object=True))
        assert "".join(chunk.content for chunk in chunks) == "base base base base "
        assert engine.bodies == []


CHAT_LOGPROBS = {
    "content": [
        {
            "token": "é",
            "logprob": -0.1234567890123,
            "bytes": [195, 169],
            "top_logprobs": [
                {"token": "é", "logprob": -0.1234567890123, "bytes": [195, 169]},
                {"token": "�", "logprob": -9999.0, "bytes": None},
            ],
        },
        {"token": "x", "logprob": -9999.0, "bytes": None, "top_logprobs": []},
    ]
}
GRPC_CHAT_LOGPROBS = [
    pb.TokenLogprob(
        token="é",
        logprob=-0.1234567890123,
        bytes="é".encode(),
        top=[
            pb.TopLogprob(token="é", logprob=-0.1234567890123, bytes="é".encode()),
            pb.TopLogprob(token="�", logprob=-9999.0),
        ],
    ),
    pb.TokenLogprob(token="x", logprob=-9999.0),
]
PROMPT_LOGPROBS = [None, {"7": {"logprob": -1.5, "rank": 2, "decoded_token": "a"}, "9": {"logprob": -0.5, "rank": 1}}]
GRPC_PROMPT_LOGPROBS = [
    pb.PromptLogprobs(),
    pb.PromptLogprobs(
        tokens=[
            pb.PromptLogprob(token_id=7, logprob=-1.5, rank=2, decoded_token="a"),
            pb.PromptLogprob(token_id=9, logprob=-0.5, rank=1),
        ]
    ),
]


async def test_a_whole_chat_answer_keeps_every_part(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [CALL]}
    choice = {"index": 0, "message": message, "logprobs": CHAT_LOGPROBS, "finish_reason": "tool_calls"}
    answer = {
        "model": BASE,
        "choices": [choice | {"token_ids": [5, 6], "stop_reason": 6}],
        "usage": USAGE["usage"],
        "prompt_token_ids": [1, 2],
        "prompt_logprobs": PROMPT_LOGPROBS,
    }
    async with both_faces(ScriptedEngine(answer=answer), tmp_path) as faces:
        response = await faces.inference.Chat(chat(BASE))
        assert response == pb.ChatResponse(
            id=response.id,
            model=BASE,
            choices=[
                pb.ChatChoice(
                    message=pb.Message(
                        role="assistant",
                        reasoning="Hm.",
                        tool_calls=[pb.ToolCall(id="call-1", name="look", arguments='{"a": 1}')],
                    ),
                    finish_reason=pb.FINISH_REASON_TOOL_CALLS,
                    logprobs=GRPC_CHAT_LOGPROBS,
                    token_ids=[5, 6],
                    stop_token_id=6,
                )
            ],
            usage=pb.Usage(prompt_tokens=9, completion_tokens=6),
            prompt_token_ids=[1, 2],
            prompt_logprobs=GRPC_PROMPT_LOGPROBS,
        )
        assert not response.choices[0].message.HasField("content")


COMPLETION_LOGPROBS = {
    "tokens": ["a", "b"],
    "token_logprobs": [None, -0.25],
    "top_logprobs": [None, {"b": -0.25, "c": -1.5}],
    "text_offset": [0, 1],
}
GRPC_COMPLETION_LOGPROBS = [
    pb.TokenLogprob(token="a", text_offset=0),
    pb.TokenLogprob(
        token="b",
        logprob=-0.25,
        top=[pb.TopLogprob(token="b", logprob=-0.25), pb.TopLogprob(token="c", logprob=-1.5)],
        text_offset=1,
    ),
]


async def test_a_completions_log_probabilities_come_whole_and_streamed(tmp_path: Path) -> None:
    choice = {"index": 0, "text": "ab", "logprobs": COMPLETION_LOGPROBS, "finish_reason": "stop", "stop_reason": "c"}
    answer = {"model": BASE, "choices": [choice | {"prompt_logprobs": PROMPT_LOGPROBS}], "usage": USAGE["usage"]}
    engine = ScriptedEngine(answer=answer, events=[{"choices": [choice]}, USAGE])
    async with both_faces(engine, tmp_path) as faces:
        whole = (await faces.inference.Complete(completion(logprobs=2))).choices[0]
        streamed = await anext(aiter(faces.inference.CompleteStream(completion(logprobs=2))))
        for part in (whole, streamed):
            assert list(part.logprobs) == GRPC_COMPLETION_LOGPROBS
            assert (part.text, part.stop_string) == ("ab", "c")
        assert list(whole.prompt_logprobs) == GRPC_PROMPT_LOGPROBS


async def test_an_echo_is_not_asked_for_token_ids_which_would_take_its_place(tmp_path: Path) -> None:
    engine = ScriptedEngine(events=[USAGE])
    async with both_faces(engine, tmp_path) as faces:
        for request, with_ids in ((completion(echo=True), None), (completion(logprobs=0), True)):
            assert [chunk async for chunk in faces.inference.CompleteStream(request)]
            assert engine.bodies[-1].get("return_token_ids") == with_ids
