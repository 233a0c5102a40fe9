"""The gRPC face says what the HTTP face says: the same fields, limits, errors and parts of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from capo_proto.v1 import inference_pb2 as pb
from registry import Registry
from registry.errors import WIRE_KINDS, InvalidRequestError
from serve.engine_api import Endpoint
from serve.grpc.requests import chat_body, completion_body
from serve.request_policy import ALLOWED, check_body
from tests.serve.fake_engine import FakeEngine
from tests.serve.grpc_channel import Faces, both_faces
from tests.serve.running import BASE, publish

HELLO = {"role": "user", "content": "hello"}
PATHS = {Endpoint.CHAT: "/v1/chat/completions", Endpoint.COMPLETION: "/v1/completions"}
METHODS = {Endpoint.CHAT: ("Chat", "ChatStream"), Endpoint.COMPLETION: ("Complete", "CompleteStream")}
BODIES = {
    Endpoint.CHAT: lambda request: chat_body(request, stream=False),
    Endpoint.COMPLETION: lambda request: completion_body(request, stream=False),
}
REQUESTS = {Endpoint.CHAT: pb.ChatRequest, Endpoint.COMPLETION: pb.CompletionRequest}
MINIMAL = {Endpoint.CHAT: {"model": BASE, "messages": [HELLO]}, Endpoint.COMPLETION: {"model": BASE, "prompt": "hello"}}

NOT_AN_ENDPOINT_OVER_GRPC = {
    Endpoint.RESPONSES: "another form of chat, for OpenAI's SDK; Chat and ChatStream say what it says",
    Endpoint.TOKENIZE: "a help for people at a terminal; completions take text and token ids alike",
    Endpoint.DETOKENIZE: "a help for people at a terminal; answers carry text and token ids",
}
NOT_A_FIELD_OVER_GRPC = {
    "stream": "the method says it",
    "stream_options": "every stream ends with its usage, and chunks count their tokens",
    "max_completion_tokens": "a second name of max_tokens",
}
CHAT, COMPLETION = Endpoint.CHAT, Endpoint.COMPLETION


def grpc_request(endpoint: Endpoint, fields: Mapping[str, Any]) -> Any:
    """``fields`` in protobuf's JSON form over the smallest request."""
    minimal = dict(MINIMAL[endpoint])
    if endpoint is COMPLETION and fields.keys() & {"promptTokenIds", "prompts", "tokenIdPrompts"}:
        del minimal["prompt"]
    return json_format.ParseDict({**minimal, **fields}, REQUESTS[endpoint]())


# -- fields ------------------------------------------------------------------------------------------------------


def messages_with_one_field(kind: Descriptor) -> Iterator[tuple[str, Any]]:
    """For each field of a message, and of the messages in it, one that has just this field; with the field's name."""
    for field in kind.fields:
        message = REQUESTS[CHAT]() if kind.name == "ChatRequest" else REQUESTS[COMPLETION]()
        if field.message_type is not None and field.message_type.name == "Sampling":
            for inner in field.message_type.fields:
                message = type(message)()
                set_any_value(message.sampling, inner)
                yield f"sampling.{inner.name}", message
        else:
            set_any_value(message, field)
            yield field.name, message


def set_any_value(message: Any, field: FieldDescriptor) -> None:
    """A value that is not the field's default."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        getattr(message, field.name)[7] = 1.0
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        if field.is_repeated:
            inner.add()
        else:
            inner.SetInParent()
    else:
        value: Any = "{}" if field.type == FieldDescriptor.TYPE_STRING else 1
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)


def test_every_endpoint_of_http_is_there_or_named() -> None:
    assert set(Endpoint) == BODIES.keys() | NOT_AN_ENDPOINT_OVER_GRPC.keys()


@pytest.mark.parametrize("endpoint", BODIES)
def test_every_field_that_http_allows_can_be_said_over_grpc(endpoint: Endpoint) -> None:
    sayable = set()
    for _, message in messages_with_one_field(REQUESTS[endpoint].DESCRIPTOR):
        sayable |= BODIES[endpoint](message).keys()
    missing = ALLOWED[endpoint] - sayable - NOT_A_FIELD_OVER_GRPC.keys()
    assert missing == set(), "give it a field in inference.proto, or name it in NOT_A_FIELD_OVER_GRPC with the reason"
    assert sayable - ALLOWED[endpoint] == set()


@pytest.mark.parametrize("endpoint", BODIES)
def test_every_field_of_a_grpc_request_changes_what_the_engine_is_asked(endpoint: Endpoint) -> None:
    nothing = BODIES[endpoint](REQUESTS[endpoint]())
    for name, message in messages_with_one_field(REQUESTS[endpoint].DESCRIPTOR):
        assert BODIES[endpoint](message) != nothing, f"{name} is accepted and ignored"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}
GRPC_TOOL = {"name": "look", "description": "Looks.", "parameters": json.dumps(SCHEMA)}
CALL = {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
GRPC_CALL = {"id": "call-1", "name": "look", "arguments": '{"a": 1}'}

# The same in JSON over HTTP and in protobuf's JSON form.
SAME: list[tuple[Endpoint, dict[str, Any], dict[str, Any]]] = [
    *(
        (CHAT, {name: value}, {"sampling": {name: value}})
        for name, value in {
            "max_tokens": 5, "temperature": 0.7, "top_p": 0.95, "top_k": -1, "min_p": 0.05, "seed": -(2**63),
            "stop": ["a", "b"], "stop_token_ids": [3], "n": 3, "frequency_penalty": -0.3, "presence_penalty": 1.1,
            "repetition_penalty": 1.2, "logit_bias": {"5": -99.9, "6": 0.1}, "min_tokens": 2, "ignore_eos": True,
            "bad_words": ["no"], "allowed_token_ids": [1, 2], "include_stop_str_in_output": True,
            "skip_special_tokens": False, "spaces_between_special_tokens": False, "add_special_tokens": True,
            "truncate_prompt_tokens": 4, "prompt_logprobs": 0, "user": "someone", "return_token_ids": True,
        }.items()
    ),
    *(
        (CHAT, {name: value}, {name: value})
        for name, value in {
            "parallel_tool_calls": False, "reasoning_effort": "low", "add_generation_prompt": False,
            "continue_final_message": True,
        }.items()
    ),
    (CHAT, {"logprobs": True, "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    (CHAT, {"tools": [TOOL]}, {"tools": [GRPC_TOOL]}),
    (CHAT, {"tools": [TOOL], "tool_choice": "none"}, {"tools": [GRPC_TOOL], "tool_choice": "TOOL_CHOICE_NONE"}),
    (CHAT, {"tools": [TOOL], "tool_choice": "auto"}, {"tools": [GRPC_TOOL], "tool_choice": "TOOL_CHOICE_AUTO"}),
    (CHAT, {"tools": [TOOL], "tool_choice": "required"}, {"tools": [GRPC_TOOL], "tool_choice": "TOOL_CHOICE_REQUIRED"}),
    (
        CHAT,
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}},
        {"tools": [GRPC_TOOL], "tool_choice_function": "look"},
    ),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
        {"sampling": {"json_schema": json.dumps(SCHEMA)}},
    ),
    (CHAT, {"response_format": {"type": "json_object"}}, {"sampling": {"json_object": True}}),
    (CHAT, {"structured_outputs": {"regex": "[ab]+"}}, {"sampling": {"regex": "[ab]+"}}),
    (CHAT, {"structured_outputs": {"choice": ["a", "b"]}}, {"sampling": {"choice": {"texts": ["a", "b"]}}}),
    (CHAT, {"structured_outputs": {"grammar": 'root ::= "a"'}}, {"sampling": {"grammar": 'root ::= "a"'}}),
    (
        CHAT,
        {
            "messages": [
                HELLO,
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": "3", "tool_call_id": "call-1"},
                {"role": "assistant", "content": "", "name": "Ann", "reasoning": "hm"},
            ]
        },
        {
            "messages": [
                HELLO,
                {"role": "assistant", "toolCalls": [GRPC_CALL]},
                {"role": "tool", "content": "3", "toolCallId": "call-1"},
                {"role": "assistant", "content": "", "name": "Ann", "reasoning": "hm"},
            ]
        },
    ),
    (COMPLETION, {"prompt": [1, 2]}, {"promptTokenIds": {"ids": [1, 2]}}),
    (COMPLETION, {"prompt": ["a", "b"]}, {"prompts": {"texts": ["a", "b"]}}),
    (COMPLETION, {"prompt": [[1], [2]]}, {"tokenIdPrompts": {"prompts": [{"ids": [1]}, {"ids": [2]}]}}),
    (COMPLETION, {"logprobs": 0}, {"logprobs": 0}),
    (COMPLETION, {"echo": True}, {"echo": True}),
    (COMPLETION, {"suffix": "end"}, {"suffix": "end"}),
]  # fmt: skip


@pytest.mark.parametrize(("endpoint", "over_http", "over_grpc"), SAME, ids=lambda value: str(value)[:60])
def test_the_same_request_is_the_same_body_on_both_faces(
    endpoint: Endpoint, over_http: dict[str, Any], over_grpc: dict[str, Any]
) -> None:
    body = BODIES[endpoint](grpc_request(endpoint, over_grpc))
    assert body == {**MINIMAL[endpoint], "stream": False, **over_http}


def test_the_samples_above_name_every_field() -> None:
    for endpoint in BODIES:
        said = {name for _, fields, _ in SAME for name in fields} | MINIMAL[endpoint].keys()
        assert ALLOWED[endpoint] - said == NOT_A_FIELD_OVER_GRPC.keys() & ALLOWED[endpoint]


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-9, 1.1754944e-38, 16777216.0, 16777217.0, -0.3, 1 / 3])
def test_a_32_bit_number_reads_as_it_was_written(value: float) -> None:
    """Independent of the conversion: protobuf's own JSON form prints the shortest digits too."""
    sampling = pb.Sampling(temperature=value)
    printed = json.loads(json_format.MessageToJson(sampling))["temperature"]
    assert chat_body(pb.ChatRequest(sampling=sampling), stream=False)["temperature"] == printed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fields", [{"temperature": 0}, {"logit_bias": {1: 0}}])
def test_a_number_that_json_cannot_say_is_refused(value: float, fields: dict[str, Any]) -> None:
    given = {name: value if kind == 0 else {1: value} for name, kind in fields.items()}
    with pytest.raises(InvalidRequestError, match="finite"):
        chat_body(pb.ChatRequest(sampling=pb.Sampling(**given)), stream=False)


@pytest.mark.parametrize("text", ["", "{", "nope", '{"a": NaN}', '{"a": 1, "a": 2}', '"\\ud800"', "[" * 100_000])
def test_a_schema_is_held_to_the_same_json_as_a_body(text: str) -> None:
    for request in (
        pb.ChatRequest(sampling=pb.Sampling(json_schema=text)),
        pb.ChatRequest(tools=[pb.Tool(name="a", parameters=text or " ")]),
    ):
        with pytest.raises(InvalidRequestError, match="not valid JSON"):
            chat_body(request, stream=False)


def test_a_schema_that_the_engine_would_not_hold_is_refused_at_its_place() -> None:
    dropped = json.dumps({"type": "integer", "multipleOf": 3})
    for request, param in (
        (pb.ChatRequest(sampling=pb.Sampling(json_schema=dropped)), "response_format.json_schema.schema"),
        (pb.ChatRequest(tools=[pb.Tool(name="a", parameters=dropped, strict=True)]), "tools.0.function.parameters"),
    ):
        request.model = "m"
        request.messages.add(role="user", content="hello")
        with pytest.raises(InvalidRequestError, match="multipleOf at # is not enforced") as caught:
            check_body(chat_body(request, stream=False), CHAT)
        assert caught.value.param == param


def test_an_enum_value_of_another_version_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="tool_choice is 9"):
        chat_body(pb.ChatRequest(tool_choice=9), stream=False)


# -- errors ------------------------------------------------------------------------------------------------------


def many(number: int) -> list[str]:
    return [f"s{n}" for n in range(number)]


def tools(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"tools": [TOOL] * number}, {"tools": [GRPC_TOOL] * number}


WRONG: dict[str, tuple[Endpoint, dict[str, Any], dict[str, Any]]] = {
    **{f"model {name[:20]!r}": (CHAT, {"model": name}, {"model": name}) for name in (
        "", "nope", "nope@12345678", "support@0000000000000000", "../etc/passwd", "ft:x",
        "ft:capo-tiny:capo:x:abcd1234", "a" * 5000, "nöpe", "ö" * 5000, "base", "Support", " ", "support@",
        "@", "a@b@c",
    )},
    "completion of no model": (COMPLETION, {"model": ""}, {"model": ""}),
    "completion of an unknown model": (COMPLETION, {"model": "nope"}, {"model": "nope"}),
    "refused adapter": (CHAT, {"model": "bad"}, {"model": "bad"}),
    **{f"{name} {value}": (CHAT, {name: value}, {"sampling": {name: value}}) for name, value in (
        ("n", 17), ("n", 0), ("n", 2**32 - 1), ("allowed_token_ids", list(range(1025))), ("bad_words", ["x" * 4097]),
        ("stop_token_ids", list(range(65))), ("logit_bias", {"5": 101.0}),
        ("prompt_logprobs", 21), ("stop", many(17)), ("stop", ["x" * 257]),
        ("logit_bias", {str(n): 1 for n in range(301)}),
    )},
    **{f"completion {name} {value}": (COMPLETION, {name: value}, {"sampling": {name: value}}) for name, value in (
        ("n", 17), ("prompt_logprobs", 100), ("stop", many(17)), ("stop", ["x" * 257]),
        ("logit_bias", {str(n): 1 for n in range(301)}),
    )},
    "a turn that says nothing": (CHAT, {"messages": [{"role": "user"}]}, {"messages": [{"role": "user"}]}),
    "an answer of a tool that nobody called": (
        CHAT,
        {"messages": [HELLO, {"role": "tool", "content": "3", "tool_call_id": "call-1"}]},
        {"messages": [HELLO, {"role": "tool", "content": "3", "toolCallId": "call-1"}]},
    ),
    "top_logprobs": (CHAT, {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": 21}),
    "logprobs": (COMPLETION, {"logprobs": 21}, {"logprobs": 21}),
    "129 tools": (CHAT, *tools(129)),
    "prompt_logprobs of many tokens": (
        COMPLETION,
        {"prompt": [[1] * 2000] * 2, "prompt_logprobs": 20},
        {"tokenIdPrompts": {"prompts": [{"ids": [1] * 2000}] * 2}, "sampling": {"prompt_logprobs": 20}},
    ),
    "logprobs of many echoes": (
        COMPLETION,
        {"prompt": [1] * 2000, "echo": True, "logprobs": 2, "n": 16},
        {"promptTokenIds": {"ids": [1] * 2000}, "echo": True, "logprobs": 2, "sampling": {"n": 16}},
    ),
    **{f"{endpoint} {name} beside a format": (
        endpoint,
        {name: value, "structured_outputs": {"choice": ["yes"]}},
        {"sampling": {name: value, "choice": {"texts": ["yes"]}}},
    ) for endpoint in (CHAT, COMPLETION) for name, value in (("ignore_eos", True), ("min_tokens", 2))},
    "33 prompts": (COMPLETION, {"prompt": many(33)}, {"prompts": {"texts": many(33)}}),
    "33 token prompts": (COMPLETION, {"prompt": [[1]] * 33}, {"tokenIdPrompts": {"prompts": [{"ids": [1]}] * 33}}),
}  # fmt: skip


def ask_http(faces: Faces, endpoint: Endpoint, fields: dict[str, Any], *, stream: bool) -> Any:
    return faces.http.post(PATHS[endpoint], json={**MINIMAL[endpoint], "stream": stream, **fields})


async def ask_grpc(faces: Faces, endpoint: Endpoint, fields: dict[str, Any], *, stream: bool) -> Any:
    call = getattr(faces.inference, METHODS[endpoint][stream])(grpc_request(endpoint, fields))
    return [message async for message in call] if stream else await call


async def assert_the_same_refusal(
    faces: Faces, endpoint: Endpoint, over_http: dict[str, Any], over_grpc: dict[str, Any], *, stream: bool
) -> None:
    response: httpx.Response = await ask_http(faces, endpoint, over_http, stream=stream)
    assert response.status_code >= 400
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask_grpc(faces, endpoint, over_grpc, stream=stream)
    error, trailers = response.json()["error"], dict(caught.value.trailing_metadata())
    assert caught.value.code().name in {
        kind.grpc_code
        for kind in WIRE_KINDS.values()
        if (kind.http_status, kind.openai_type) == (response.status_code, error["type"])
    }
    assert trailers["capo-error-code"] == error["code"]
    assert trailers.get("capo-error-param") == error["param"]
    assert caught.value.details() == error["message"][:1000]
    assert trailers.get("retry-after") == response.headers.get("retry-after")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_request_gets_the_same_refusal_on_both_faces(tmp_path: Path, case: str, stream: bool) -> None:
    registry, engine = Registry(tmp_path), FakeEngine()
    publish(registry, "support", alias="support")
    engine.refuse.add(publish(registry, "bad", alias="bad").revision)
    async with both_faces(engine, tmp_path) as faces:
        await assert_the_same_refusal(faces, *WRONG[case], stream=stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("state", ["draining", "dying", "model full", "service full"])
async def test_a_service_that_cannot_answer_says_so_alike_on_both_faces(
    tmp_path: Path, state: str, stream: bool
) -> None:
    engine = FakeEngine()
    limits = {"model full": {"max_in_flight_per_model": 0}, "service full": {"max_in_flight": 0}}.get(state, {})
    async with both_faces(engine, tmp_path, **limits) as faces:
        if state == "draining":
            await faces.service.drain(0)
        if state == "dying":
            engine.die()
        await assert_the_same_refusal(faces, CHAT, {}, {}, stream=stream)
