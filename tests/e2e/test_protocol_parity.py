"""The same question over HTTP and gRPC, streamed or not, gets the same answer from the real engine."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.adapters import write_random_adapter
from capo.client import (
    CapoClient,
    CapoClientError,
    ChatOptions,
    DeadlineExceededError,
    Message,
    NamedTool,
    Sampling,
    Tool,
)
from capo_proto.v1 import inference_pb2, inference_pb2_grpc
from registry import locate_base_model
from tests.e2e.four_ways import Question, over_grpc, over_grpc_stream, over_http, over_http_stream
from tests.e2e.service import Service, running

pytestmark = pytest.mark.engine

NUM_REQUESTS = 100
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
QUESTIONS = ("Who are you?", "Where is the mill?", "Who lives beside the river?", "What do the children eat?", "Zz 7")
PROMPTS = ("The baker", "In the village", "1 + 1 =", "Every morning", "")


@pytest.fixture(scope="module")
def models(service: Service, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The base and two random adapters, by every kind of name."""
    base = locate_base_model("capo-tiny")
    names = [base.id]
    for number, name in enumerate(("parity-one", "parity-two")):
        folder = write_random_adapter(tmp_path_factory.mktemp(name) / "a", base, rank=8, seed=number, scale=0.05)
        artifact = service.registry.import_adapter(folder, name=name, base_model=base, alias=f"{name}-alias")
        names += [f"{name}-alias", artifact.revision, f"{name}@{artifact.digest[:9]}"]
    return names


def random_question(source: random.Random, models: list[str]) -> Question:
    shared: dict[str, Any] = {"max_tokens": source.randint(1, 20)}
    if source.random() < 0.5:
        shared["temperature"] = 0
    else:
        shared |= {"temperature": source.choice([0.3, 0.7, 1.3]), "seed": source.randint(0, 2**31)}
        shared |= {"top_p": 0.9} if source.random() < 0.5 else {"top_k": 40, "min_p": 0.01}
        if source.random() < 0.4:
            shared["n"] = source.randint(2, 4)
    for chance, given in (
        (0.3, {"stop": source.sample(["e", " the", ".", "a", "\n"], 2)}),
        (0.1, {"stop": ["i"], "include_stop_str_in_output": True}),
        (0.2, {"logit_bias": {str(source.randint(5, 400)): source.choice([-99.0, 3.7]) for _ in range(4)}}),
        (0.2, {"frequency_penalty": 0.7, "presence_penalty": -0.4}),
        (0.2, {"repetition_penalty": 1.3}),
        (0.1, {"stop_token_ids": source.sample(range(5, 400), 5)}),
        (0.1, {"ignore_eos": True, "min_tokens": 1}),
        (0.1, {"bad_words": ["mill"], "skip_special_tokens": False}),
    ):
        if source.random() < chance:
            shared |= given
    logprobs = source.choice([0, 2, 5]) if source.random() < 0.2 else None
    model = source.choice(models)
    if source.random() < 0.5:
        prompt = source.choice([*PROMPTS, [source.randint(5, 400) for _ in range(6)]]) or "a"
        return Question(model, shared, prompt=prompt, logprobs=logprobs)
    turns = [{"role": "user", "content": source.choice(QUESTIONS)}]
    if source.random() < 0.3:
        turns = [{"role": "system", "content": "Be kind."}, *turns]
    schema = SCHEMA if source.random() < 0.2 else None
    if schema is not None:
        shared["max_tokens"] = 48
        for name in ("stop", "ignore_eos", "min_tokens"):
            shared.pop(name, None)
    return Question(model, shared, turns=turns, schema=schema, logprobs=logprobs)


def test_a_hundred_random_requests_get_the_same_answer_all_four_ways(service: Service, models: list[str]) -> None:
    source = random.Random(20261121)
    kinds: set[str] = set()
    with httpx.Client(base_url=service.url, timeout=120) as http, CapoClient(service.grpc_address) as client:
        for number in range(NUM_REQUESTS):
            question = random_question(source, models)
            expected = over_http(http, question)
            assert expected.ends.keys() == set(range(question.shared.get("n", 1)))
            for way, answer in (
                ("HTTP stream", over_http_stream(http, question)),
                ("gRPC", over_grpc(client, question)),
                ("gRPC stream", over_grpc_stream(client, question)),
            ):
                assert answer == expected, f"{way}, request {number}: {question}"
            kinds |= {expected.model, *(reason for reason, _ in expected.ends.values()), *question.shared}
    assert {"stop", "length", "n", "seed", "stop_token_ids", "logit_bias", "bad_words"} <= kinds
    assert sum(name.startswith(("capo-tiny", "parity-")) for name in kinds) == 3


@pytest.mark.parametrize(
    ("fields", "sampling", "options_"),
    [
        ({"temperature": -1}, Sampling(temperature=-1), ChatOptions()),
        ({"top_p": 2}, Sampling(top_p=2), ChatOptions()),
        ({"top_k": -5}, Sampling(top_k=-5), ChatOptions()),
        ({"max_tokens": 0}, Sampling(max_tokens=0), ChatOptions()),
        ({"max_tokens": 10**6}, Sampling(max_tokens=10**6), ChatOptions()),
        ({"min_tokens": 9, "max_tokens": 3}, Sampling(min_tokens=9, max_tokens=3), ChatOptions()),
        ({"logit_bias": {"999999": 1}}, Sampling(logit_bias={999999: 1}), ChatOptions()),
        ({"allowed_token_ids": [999999]}, Sampling(allowed_token_ids=[999999]), ChatOptions()),
        ({"min_tokens": 3, "allowed_token_ids": [2]}, Sampling(min_tokens=3, allowed_token_ids=[2]), ChatOptions()),
        ({"top_logprobs": 3}, Sampling(), ChatOptions(top_logprobs=3)),
        ({"continue_final_message": True}, Sampling(), ChatOptions(continue_final_message=True)),
        ({"reasoning_effort": "enormous"}, Sampling(), ChatOptions(reasoning_effort="enormous")),
    ],
)
def test_what_the_engine_refuses_is_refused_alike(
    service: Service, fields: dict[str, Any], sampling: Sampling, options_: ChatOptions
) -> None:
    body = {"model": "capo-tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
    with CapoClient(service.grpc_address, retries=0) as client:
        for stream in (False, True):
            response = httpx.post(f"{service.url}/v1/chat/completions", json={**body, "stream": stream}, timeout=60)
            assert response.status_code == 400
            ask = (lambda *a, **k: list(client.chat_stream(*a, **k))) if stream else client.chat
            with pytest.raises(CapoClientError) as caught:
                ask("capo-tiny", "hi", sampling=sampling, options=options_)
            error = response.json()["error"]
            assert caught.value.status == grpc.StatusCode.INVALID_ARGUMENT
            assert (caught.value.code, caught.value.param) == (error["code"], error["param"])


def test_a_name_that_the_model_never_sees_is_refused_alike(service: Service) -> None:
    body = {"model": "capo-tiny", "messages": [{"role": "user", "content": "hi", "name": "Ann"}]}
    for path in ("/v1/chat/completions", "/tokenize"):
        response = httpx.post(f"{service.url}{path}", json=body, timeout=60)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages.0.name")
    with CapoClient(service.grpc_address, retries=0) as client:
        with pytest.raises(CapoClientError) as caught:
            client.chat("capo-tiny", [Message("user", "hi", name="Ann")])
        assert (caught.value.status, caught.value.param) == (grpc.StatusCode.INVALID_ARGUMENT, "messages.0.name")


def test_a_forced_tool_call_streams_in_the_same_parts(service: Service) -> None:
    tool = {"name": "look", "description": "Looks.", "parameters": SCHEMA}
    body = {
        "model": "capo-tiny",
        "messages": [{"role": "user", "content": "Look!"}],
        "tools": [{"type": "function", "function": tool}],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "temperature": 0,
        "max_tokens": 64,
    }
    whole = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
    (call,) = whole["message"]["tool_calls"]
    with CapoClient(service.grpc_address) as client:
        options = ChatOptions(tools=[Tool("look", "Looks.", SCHEMA)], tool_choice=NamedTool("look"))
        sampling = Sampling(temperature=0, max_tokens=64)
        answer = client.chat("capo-tiny", "Look!", sampling=sampling, options=options).choices[0]
        pieces = list(client.chat_stream("capo-tiny", "Look!", sampling=sampling, options=options))
    deltas = [delta for piece in pieces for delta in piece.tool_calls]
    assert [c.name for c in answer.message.tool_calls] == [call["function"]["name"]] == ["look"]
    assert "".join(delta.name for delta in deltas) == "look"
    assert "".join(delta.arguments for delta in deltas) == call["function"]["arguments"]
    assert answer.message.tool_calls[0].arguments == call["function"]["arguments"]
    assert json.loads(call["function"]["arguments"])
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [whole["finish_reason"]]
    assert "".join(piece.text for piece in pieces) == ""


def running_requests(service: Service) -> float:
    page = httpx.get(f"{service.url}/metrics").text
    line = next(line for line in page.splitlines() if line.startswith("vllm:num_requests_running{"))
    return float(line.rsplit(" ", 1)[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_passed_deadline_aborts_the_engines_request_within_a_second(service: Service, stream: bool) -> None:
    long = Sampling(max_tokens=1500, ignore_eos=True)
    with CapoClient(service.grpc_address, timeout_seconds=0.7) as client:
        ask = (lambda *a, **k: list(client.complete_stream(*a, **k))) if stream else client.complete
        with pytest.raises(DeadlineExceededError):
            ask("capo-tiny", "a", sampling=long)
    began = time.monotonic()
    while running_requests(service):
        assert time.monotonic() - began < 1
        time.sleep(0.05)


async def test_health_says_not_serving_before_a_drain_and_open_streams_finish(tmp_path: Path) -> None:
    with running(tmp_path, "--workers", "0") as service:
        async with grpc.aio.insecure_channel(service.grpc_address) as channel:
            watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
            assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
            request = inference_pb2.CompletionRequest(
                model="capo-tiny", prompt="a", sampling=inference_pb2.Sampling(max_tokens=600, ignore_eos=True)
            )
            stub = inference_pb2_grpc.InferenceStub(channel)
            stream = aiter(stub.CompleteStream(request))
            await anext(stream)
            service.process.send_signal(signal.SIGTERM)
            assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Complete(request)
            assert dict(caught.value.trailing_metadata())["capo-error-code"] == "draining"
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage.completion_tokens == 600
        assert await asyncio.to_thread(service.process.wait, 30) == 0
