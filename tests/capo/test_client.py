"""The Python client against a real server: results, errors, retries, deadlines, and how little it imports."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from capo import client as public
from capo.client import (
    AsyncCapoClient,
    CapoClient,
    CapoClientError,
    ChatOptions,
    Choice,
    CompletionOptions,
    FinishReason,
    Grammar,
    JsonObject,
    JsonSchema,
    Message,
    NamedTool,
    Regex,
    Sampling,
    Tool,
    ToolCall,
    ToolChoice,
)
from capo.client.to_protobuf import chat_request, completion_request
from capo_proto.v1 import inference_pb2 as pb
from capo_proto.v1 import inference_pb2_grpc
from registry import Registry
from serve.engine_api import Call
from tests.serve.fake_engine import FakeEngine
from tests.serve.grpc_channel import Faces, both_faces
from tests.serve.running import BASE, eventually, publish

Result = TypeVar("Result")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


async def in_thread(work: Callable[[CapoClient], Result], faces: Faces, **options: Any) -> Result:
    """Run ``work`` with a client of its own, beside the event loop that serves it."""

    def run() -> Result:
        with CapoClient(faces.address, **options) as client:
            return work(client)

    return await asyncio.to_thread(run)


# -- answers ---------------------------------------------------------------------------------------------------------


async def test_both_clients_give_the_same_answers(tmp_path: Path) -> None:
    artifact = publish(Registry(tmp_path), "support", alias="help")
    said = f"{artifact.revision} " * 3

    async with both_faces(FakeEngine(num_tokens=3), tmp_path) as faces:

        def ask(client: CapoClient) -> list[Any]:
            return [
                client.chat("help", "hello").text,
                client.complete("help", "hello").text,
                "".join(piece.text for piece in client.chat_stream("help", [Message("user", "hello")])),
                "".join(piece.text for piece in client.complete_stream("help", [1, 2])),
                client.models(),
                client.adapters(),
                client.aliases(),
                client.health(),
            ]

        threaded = await in_thread(ask, faces)
        async with AsyncCapoClient(faces.address) as client:
            awaited = [
                (await client.chat("help", "hello")).text,
                (await client.complete("help", "hello")).text,
                "".join([piece.text async for piece in client.chat_stream("help", [Message("user", "hello")])]),
                "".join([piece.text async for piece in client.complete_stream("help", [1, 2])]),
                await client.models(),
                await client.adapters(),
                await client.aliases(),
                await client.health(),
            ]
        assert threaded == awaited
        assert threaded[:4] == [said] * 4
        assert [model.id for model in threaded[4]] == [BASE, "help"]
        assert [(adapter.revision, adapter.state) for adapter in threaded[5]] == [(artifact.revision, "loaded")]
        assert [(alias.alias, alias.revision) for alias in threaded[6]] == [("help", artifact.revision)]


async def test_a_stream_ends_with_its_usage(tmp_path: Path) -> None:
    async with both_faces(FakeEngine(num_tokens=3), tmp_path) as faces:
        pieces = await in_thread(lambda client: list(client.chat_stream(BASE, "hello")), faces)
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [FinishReason.STOP]
        assert [piece.usage is not None for piece in pieces] == [False] * 4 + [True]
        assert sum(piece.num_tokens for piece in pieces) == 3


async def test_an_alias_is_set_for_what_comes_after(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    revisions = [publish(registry, "support", content).revision for content in ("one", "two")]
    async with both_faces(FakeEngine(), tmp_path) as faces:

        def flip(client: CapoClient) -> list[str]:
            models = []
            for revision in revisions:
                assert client.set_alias("support", revision).revision == revision
                models.append(client.chat("support", "hello").model)
            return models

        assert await in_thread(flip, faces) == revisions


async def test_health_is_false_while_the_server_takes_nothing(tmp_path: Path) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        await faces.server.set_serving(False)
        assert not await in_thread(lambda client: client.health("capo.v1.Inference"), faces)


def test_every_option_reaches_the_request() -> None:
    """Against protobuf written by hand."""
    sampling = Sampling(
        max_tokens=0,
        temperature=0.0,
        top_k=-1,
        seed=-1,
        stop=["a"],
        logit_bias={3: 0.5},
        skip_special_tokens=False,
        user="someone",
        structure=JsonSchema(SCHEMA),
    )
    options = ChatOptions(
        tools=[Tool("look", "Looks.", SCHEMA, strict=True)],
        tool_choice=ToolChoice.REQUIRED,
        parallel_tool_calls=False,
        logprobs=True,
        top_logprobs=0,
    )
    turns = [
        Message("user", "hello"),
        Message("assistant", tool_calls=(ToolCall("1", "look", "{}"),)),
        Message("tool", "", tool_call_id="1"),
    ]
    assert chat_request("m", turns, sampling, options) == pb.ChatRequest(
        model="m",
        messages=[
            pb.Message(role="user", content="hello"),
            pb.Message(role="assistant", tool_calls=[pb.ToolCall(id="1", name="look", arguments="{}")]),
            pb.Message(role="tool", content="", tool_call_id="1"),
        ],
        sampling=pb.Sampling(
            max_tokens=0,
            temperature=0,
            top_k=-1,
            seed=-1,
            stop=["a"],
            logit_bias={3: 0.5},
            skip_special_tokens=False,
            user="someone",
            json_schema=json.dumps(SCHEMA),
        ),
        tools=[pb.Tool(name="look", description="Looks.", parameters=json.dumps(SCHEMA), strict=True)],
        tool_choice=pb.TOOL_CHOICE_REQUIRED,
        parallel_tool_calls=False,
        logprobs=True,
        top_logprobs=0,
    )
    named = chat_request("m", "hi", Sampling(), ChatOptions(tool_choice=NamedTool("look")))
    assert named.tool_choice_function == "look"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", pb.CompletionRequest(prompt="text")),
        ("", pb.CompletionRequest(prompt="")),
        ([1, 2], pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=[1, 2]))),
        ([], pb.CompletionRequest(prompt_token_ids=pb.TokenIds())),
        (["a", "b"], pb.CompletionRequest(prompts=pb.Prompts(texts=["a", "b"]))),
        ([[1], [2]], pb.CompletionRequest(token_id_prompts=pb.TokenIdPrompts(prompts=[{"ids": [1]}, {"ids": [2]}]))),
    ],
)
def test_a_prompt_may_be_text_or_tokens_one_or_many(prompt: Any, expected: pb.CompletionRequest) -> None:
    expected.sampling.SetInParent()
    assert completion_request("", prompt, Sampling(), CompletionOptions()) == expected


@pytest.mark.parametrize(
    ("structure", "field"),
    [
        (JsonObject(), {"json_object": True}),
        (Regex("a+"), {"regex": "a+"}),
        (Choice(["a"]), {"choice": {"texts": ["a"]}}),
        (Grammar("root ::= x"), {"grammar": "root ::= x"}),
    ],
)
def test_each_structure_has_its_field(structure: Any, field: dict[str, Any]) -> None:
    request = chat_request("m", "hi", Sampling(structure=structure), ChatOptions())
    assert request.sampling == pb.Sampling(**field)


def test_a_text_is_never_taken_for_a_list_of_its_letters() -> None:
    assert chat_request("m", "hello", Sampling(stop="END"), ChatOptions()).sampling.stop == ["END"]
    assert chat_request("m", "hello", Sampling(stop=["END", "x"]), ChatOptions()).sampling.stop == ["END", "x"]
    with pytest.raises(TypeError, match="bad_words is a list of texts, got the text 'foo'"):
        Sampling(bad_words="foo")
    with pytest.raises(TypeError, match=r"Choice\.texts is a list of texts"):
        Choice("yes")


def test_the_options_cover_every_field_of_the_definition() -> None:
    def names(*kinds: type) -> set[str]:
        return {name for kind in kinds for name in inspect.signature(kind).parameters}

    structure = {field.name for field in pb.Sampling.DESCRIPTOR.oneofs_by_name["structure"].fields}
    assert {field.name for field in pb.Sampling.DESCRIPTOR.fields} - structure == names(Sampling) - {"structure"}
    assert {field.name for field in pb.ChatRequest.DESCRIPTOR.fields} == names(ChatOptions) | {
        "model", "messages", "sampling", "tool_choice_function",
    }  # fmt: skip
    assert {field.name for field in pb.CompletionRequest.DESCRIPTOR.fields} == names(CompletionOptions) | {
        "model", "sampling", "prompt", "prompt_token_ids", "prompts", "token_id_prompts",
    }  # fmt: skip


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    assert methods(CapoClient) == methods(AsyncCapoClient)
    assert len(methods(CapoClient)) > 8


# -- errors ----------------------------------------------------------------------------------------------------------


async def error_of(work: Callable[[CapoClient], Any], faces: Faces, **options: Any) -> CapoClientError:
    with pytest.raises(CapoClientError) as caught:
        await in_thread(work, faces, **options)
    return caught.value


async def test_an_error_carries_code_status_parameter_and_request_id(tmp_path: Path) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        missing = await error_of(lambda client: client.chat("nope", "hi", request_id="my-id"), faces)
        assert isinstance(missing, public.NotFoundError)
        assert (missing.status, missing.code) == (grpc.StatusCode.NOT_FOUND, "model_not_found")
        assert (missing.param, missing.request_id) == ("model", "my-id")
        wrong = await error_of(lambda client: list(client.chat_stream(BASE, "hi", sampling=Sampling(n=99))), faces)
        assert isinstance(wrong, public.InvalidRequestError)
        assert wrong.param == "n"
        await faces.service.drain(0)
        draining = await error_of(lambda client: client.chat(BASE, "hi"), faces, retries=0)
        assert isinstance(draining, public.UnavailableError)
        assert (draining.code, draining.retry_after_seconds) == ("draining", 5)


async def test_both_clients_raise_the_same_error(tmp_path: Path) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        threaded = await error_of(lambda client: client.chat("nope", "hi", request_id="a"), faces)
        async with AsyncCapoClient(faces.address) as client:
            with pytest.raises(public.NotFoundError) as caught:
                await client.chat("nope", "hi", request_id="a")
        assert vars(threaded) == vars(caught.value)


def test_every_error_of_the_table_has_a_class_of_its_own() -> None:
    from capo.client.errors import _KINDS
    from registry.errors import WIRE_KINDS

    sent = {getattr(grpc.StatusCode, kind.grpc_code) for kind in WIRE_KINDS.values()}
    assert sent - _KINDS.keys() == {grpc.StatusCode.INTERNAL}  # ServerError, like whatever is unknown
    assert len(set(_KINDS.values())) == len(_KINDS)


LONE_SURROGATE = "\ud800"
UNSENDABLE: list[tuple[Callable[[Any], Any], str]] = [
    (lambda client: client.chat("m", "x", sampling=Sampling(max_tokens=-1)), "max_tokens"),
    (lambda client: client.chat("m", "x", sampling=Sampling(temperature="hot")), "temperature"),
    (lambda client: client.chat("m", LONE_SURROGATE), "content"),
    (lambda client: client.chat("m", [{"role": "user", "content": "x"}]), "messages"),
    (lambda client: client.chat("m", "x", options=ChatOptions(tools=[Tool("t", parameters={"a": {1}})])), "parameters"),
    (lambda client: client.chat(3, "x"), "model"),
    (lambda client: client.chat("m", "x", request_id="\u00e9"), "request_id"),
    (lambda client: client.chat("m", "x", request_id="a\n"), "request_id"),
    (lambda client: client.complete("m", [[1, 2], "x"]), "ids"),
    (lambda client: client.complete("m", [1, "x"]), "ids"),
    (lambda client: client.complete("m", 3), "prompt"),
    (lambda client: client.complete("m", "x", sampling=Sampling(structure=JsonSchema({"a": {1}}))), "json_schema"),
    (lambda client: client.set_alias(3, "x"), "alias"),
    (lambda client: client.health(3), "service"),
    (lambda client: client.job(3), "job_id"),
    (lambda client: client.jobs(limit=-1), "limit"),
    (lambda client: client.create_job("m", "f", options=public.JobOptions(seed=-1)), "seed"),
    (lambda client: client.create_job("m", "f", options=public.JobOptions(capo={"a": {1}})), "capo"),
]


@pytest.mark.parametrize(("work", "param"), UNSENDABLE)
async def test_what_no_message_can_hold_is_an_invalid_request_that_names_the_field(
    work: Callable[[Any], Any], param: str
) -> None:
    """Nothing is sent: nobody listens at the address."""
    with CapoClient("127.0.0.1:1", retries=0) as threaded, pytest.raises(public.InvalidRequestError) as caught:
        work(threaded)
    assert (caught.value.param, caught.value.status) == (param, grpc.StatusCode.INVALID_ARGUMENT)
    async with AsyncCapoClient("127.0.0.1:1", retries=0) as client:
        with pytest.raises(public.InvalidRequestError) as awaited:
            await work(client)
    assert vars(awaited.value) == vars(caught.value)


async def test_a_client_that_is_closed_says_so() -> None:
    threaded, client = CapoClient("127.0.0.1:1"), AsyncCapoClient("127.0.0.1:1")
    threaded.close()
    await client.close()
    for work in (lambda client: client.chat("m", "x"), lambda client: client.health()):
        with pytest.raises(public.UnavailableError, match="closed"):
            work(threaded)
        with pytest.raises(public.UnavailableError, match="closed"):
            await work(client)
    for stream in (lambda client: client.chat_stream("m", "x"), lambda client: client.follow_job("j")):
        with pytest.raises(public.UnavailableError, match="closed"):
            next(stream(threaded))
        with pytest.raises(public.UnavailableError, match="closed"):
            await anext(stream(client))


async def test_a_key_is_sent_without_the_newline_of_its_file_and_one_that_is_none_is_refused() -> None:
    sent: list[str] = []

    class Listening(Flaky):
        async def Chat(self, request: Any, context: Any) -> Any:
            sent.append(dict(context.invocation_metadata()).get("authorization", ""))
            return await super().Chat(request, context)

    for kind in ("threaded", "asyncio"):
        for key in (" capo-abc\n", ""):
            servicer = Listening(0, grpc.StatusCode.OK)
            assert await ask_flaky(servicer, kind=kind, stream=False, api_key=key) == "yes"
    assert sent == ["Bearer capo-abc", ""] * 2
    for make in (CapoClient, AsyncCapoClient):
        with pytest.raises(public.InvalidRequestError, match="api_key") as caught:
            make("127.0.0.1:1", api_key="capo\nabc")
        assert "abc" not in caught.value.message


async def test_a_timeout_ends_a_call_and_the_servers_work_on_it(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with both_faces(engine, tmp_path) as faces:
        engine.answer_gate.clear()
        began = time.monotonic()
        slow = await error_of(lambda client: client.chat(BASE, "hi"), faces, timeout_seconds=0.3)
        assert isinstance(slow, public.DeadlineExceededError)
        assert time.monotonic() - began < 2
        await eventually(lambda: engine.waiting == 0, seconds=1)


@pytest.mark.parametrize("kind", ["threaded", "asyncio"])
async def test_leaving_a_stream_early_stops_the_servers_work_on_it(tmp_path: Path, kind: str) -> None:
    engine = FakeEngine(num_tokens=10_000_000)
    artifact = publish(Registry(tmp_path), "support")

    def is_held() -> bool:
        return any(resident.users for resident in faces.service.pool.residents())

    async with both_faces(engine, tmp_path) as faces, AsyncCapoClient(faces.address) as client:
        if kind == "threaded":
            # The client stays open: it is the iterator's end that must stop the stream.
            threaded = CapoClient(faces.address)
            stream = threaded.chat_stream(artifact.revision, "hi")
            await asyncio.to_thread(next, stream)
            assert is_held()
            await asyncio.to_thread(stream.close)
        else:
            async with contextlib.aclosing(client.chat_stream(artifact.revision, "hi")) as pieces:
                await anext(pieces)
                assert is_held()
        await eventually(lambda: not is_held(), seconds=2)
        if kind == "threaded":
            threaded.close()


# -- retries ---------------------------------------------------------------------------------------------------------


class Flaky(inference_pb2_grpc.InferenceServicer):
    """Fails so many times with a status before, or after, a first piece of output."""

    def __init__(self, failures: int, status: grpc.StatusCode, *, after_output: bool = False) -> None:
        self._failures = failures
        self._status = status
        self._after_output = after_output
        self.calls = 0

    async def Chat(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.calls <= self._failures:
            await context.abort(self._status, "not today")
        message = pb.Message(role="assistant", content="yes")
        return pb.ChatResponse(choices=[pb.ChatChoice(message=message, finish_reason=pb.FINISH_REASON_STOP)])

    async def ChatStream(self, request: Any, context: Any) -> AsyncGenerator[pb.ChatChunk, None]:
        self.calls += 1
        if self.calls <= self._failures:
            if self._after_output:
                yield pb.ChatChunk(content="half", num_tokens=1)
            await context.abort(self._status, "not today")
        yield pb.ChatChunk(content="yes", num_tokens=1)


@contextlib.asynccontextmanager
async def address_of(servicer: Flaky) -> AsyncIterator[str]:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def ask_flaky(servicer: Flaky, *, kind: str, stream: bool, **options: Any) -> str:
    async with address_of(servicer) as address:
        if kind == "asyncio":
            async with AsyncCapoClient(address, **options) as client:
                if stream:
                    return "".join([piece.text async for piece in client.chat_stream("m", "hi")])
                return (await client.chat("m", "hi")).text

        def ask() -> str:
            with CapoClient(address, **options) as client:
                if stream:
                    return "".join(piece.text for piece in client.chat_stream("m", "hi"))
                return client.chat("m", "hi").text

        return await asyncio.to_thread(ask)


@pytest.mark.parametrize("kind", ["threaded", "asyncio"])
@pytest.mark.parametrize("stream", [False, True])
class TestRetries:
    async def test_an_unavailable_server_is_asked_again(self, kind: str, stream: bool) -> None:
        servicer = Flaky(2, grpc.StatusCode.UNAVAILABLE)
        assert await ask_flaky(servicer, kind=kind, stream=stream) == "yes"
        assert servicer.calls == 3

    async def test_it_is_not_asked_for_ever(self, kind: str, stream: bool) -> None:
        servicer = Flaky(99, grpc.StatusCode.UNAVAILABLE)
        with pytest.raises(public.UnavailableError):
            await ask_flaky(servicer, kind=kind, stream=stream)
        assert servicer.calls == 3

    async def test_retries_can_be_turned_off(self, kind: str, stream: bool) -> None:
        servicer = Flaky(1, grpc.StatusCode.UNAVAILABLE)
        with pytest.raises(public.UnavailableError):
            await ask_flaky(servicer, kind=kind, stream=stream, retries=0)
        assert servicer.calls == 1

    @pytest.mark.parametrize("status", ["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "INTERNAL", "NOT_FOUND"])
    async def test_nothing_else_is_asked_again(self, kind: str, stream: bool, status: str) -> None:
        servicer = Flaky(1, grpc.StatusCode[status])
        with pytest.raises(CapoClientError):
            await ask_flaky(servicer, kind=kind, stream=stream)
        assert servicer.calls == 1

    async def test_no_retry_outlives_the_timeout(self, kind: str, stream: bool) -> None:
        servicer = Flaky(99, grpc.StatusCode.UNAVAILABLE)
        began = time.monotonic()
        with pytest.raises(CapoClientError):
            await ask_flaky(servicer, kind=kind, stream=stream, retries=50, timeout_seconds=0.5)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("kind", ["threaded", "asyncio"])
async def test_a_stream_that_has_begun_is_never_begun_again(kind: str) -> None:
    servicer = Flaky(1, grpc.StatusCode.UNAVAILABLE, after_output=True)
    with pytest.raises(public.UnavailableError):
        await ask_flaky(servicer, kind=kind, stream=True)
    assert servicer.calls == 1


def test_a_negative_number_of_retries_is_refused() -> None:
    with pytest.raises(ValueError, match="retries is -1"):
        CapoClient(retries=-1)


async def test_metadata_goes_with_every_call(tmp_path: Path) -> None:
    seen: list[Call] = []

    class Watching(FakeEngine):
        async def complete(self, call: Call) -> bytes:
            seen.append(call)
            return await super().complete(call)

    trace = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    async with both_faces(Watching(), tmp_path) as faces:
        await in_thread(lambda client: client.chat(BASE, "hi"), faces, metadata=[trace])
        assert seen[0].trace_headers == dict([trace])


def test_importing_the_client_imports_nothing_heavy() -> None:
    heavy = ("vllm", "torch", "transformers", "fastapi", "uvicorn", "pydantic", "serve", "tune", "registry")
    script = f"import sys, capo.client; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
