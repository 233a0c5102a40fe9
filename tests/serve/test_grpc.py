"""The gRPC face on a real socket, with a real channel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from capo_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from registry import Registry
from serve.engine_api import Engine
from serve.grpc import GrpcServer
from serve.service import ServingService
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import BASE, eventually, publish, running_service


@contextlib.asynccontextmanager
async def channel_to(engine: Engine, registry_dir: Path) -> AsyncIterator[tuple[grpc.aio.Channel, ServingService]]:
    async with running_service(engine, registry_dir) as (_, service):
        server = GrpcServer(service)
        port = await server.start("127.0.0.1", 0)
        await server.set_serving(True)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel, service
        await server.stop()


def chat(model: str) -> inference_pb2.ChatRequest:
    return inference_pb2.ChatRequest(model=model, messages=[inference_pb2.Message(role="user", content="hello")])


async def test_a_streamed_chat_carries_text_a_finish_reason_and_usage(tmp_path: Path) -> None:
    artifact = publish(Registry(tmp_path), "support", alias="help")
    async with channel_to(FakeEngine(num_tokens=3), tmp_path) as (channel, _):
        chunks = [chunk async for chunk in inference_pb2_grpc.InferenceStub(channel).ChatStream(chat("help"))]
        assert {chunk.model for chunk in chunks} == {artifact.revision}
        assert "".join(chunk.content for chunk in chunks) == f"{artifact.revision} " * 3
        assert chunks[-2].finish_reason == inference_pb2.FINISH_REASON_STOP
        assert chunks[-1].usage.completion_tokens == 3


async def test_a_completion_answers_in_one_piece(tmp_path: Path) -> None:
    async with channel_to(FakeEngine(num_tokens=3), tmp_path) as (channel, _):
        request = inference_pb2.CompletionRequest(model=BASE, prompt="hello")
        answer = await inference_pb2_grpc.InferenceStub(channel).Complete(request)
        assert answer.choices[0].text == "base base base "
        assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (chat("nope"), grpc.StatusCode.NOT_FOUND, "model_not_found"),
        (chat(""), grpc.StatusCode.INVALID_ARGUMENT, "invalid_request"),
        (
            inference_pb2.ChatRequest(model=BASE, sampling=inference_pb2.Sampling(n=10_000)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "invalid_request",
        ),
        (
            inference_pb2.ChatRequest(model=BASE, sampling=inference_pb2.Sampling(json_schema="{")),
            grpc.StatusCode.INVALID_ARGUMENT,
            "invalid_request",
        ),
    ],
)
async def test_errors_come_from_the_same_table_as_over_http(
    tmp_path: Path, request_: inference_pb2.ChatRequest, status: grpc.StatusCode, code: str
) -> None:
    async with channel_to(FakeEngine(), tmp_path) as (channel, _):
        stub = inference_pb2_grpc.InferenceStub(channel)
        for answer in (stub.Chat(request_), anext(aiter(stub.ChatStream(request_)))):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer
            assert caught.value.code() == status
            assert dict(caught.value.trailing_metadata())["capo-error-code"] == code


async def test_a_stream_cut_by_the_engines_death_ends_with_a_status_that_is_not_ok(tmp_path: Path) -> None:
    engine = FakeEngine(num_tokens=5)
    async with channel_to(engine, tmp_path) as (channel, _):
        engine.fail_after_tokens = 2
        stream = aiter(inference_pb2_grpc.InferenceStub(channel).ChatStream(chat(BASE)))
        assert [(await anext(stream)).content, (await anext(stream)).content] == ["base ", "base "]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(stream)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_client_that_gives_up_frees_its_adapter(tmp_path: Path, how: str) -> None:
    engine = FakeEngine(num_tokens=1000)
    artifact = publish(Registry(tmp_path), "support")
    async with channel_to(engine, tmp_path) as (channel, service):
        stub = inference_pb2_grpc.InferenceStub(channel)
        stream = stub.ChatStream(chat(artifact.revision), timeout=0.3 if how == "deadline" else None)
        await anext(aiter(stream))
        engine.answer_gate.clear()
        if how == "cancel":
            stream.cancel()
        await eventually(lambda: not any(resident.users for resident in service.pool.residents()), seconds=1)


async def test_reflection_lists_every_service_and_health_follows_readiness(tmp_path: Path) -> None:
    async with running_service(FakeEngine(), tmp_path) as (_, service):
        server = GrpcServer(service)
        port = await server.start("127.0.0.1", 0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
            replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(requests))
            names = {s.name async for reply in replies for s in reply.list_services_response.service}
            assert {"capo.v1.Inference", "capo.v1.Adapters", "grpc.health.v1.Health"} <= names
            health = health_pb2_grpc.HealthStub(channel)
            for is_serving, status in ((False, "NOT_SERVING"), (True, "SERVING")):
                await server.set_serving(is_serving)
                for name in ("", "capo.v1.Inference"):
                    answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                    assert health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == status
        await server.stop()


async def test_aliases_and_adapters_are_the_same_as_over_http(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    one, two = publish(registry, "support", "one", alias="help"), publish(registry, "support", "two")
    async with channel_to(FakeEngine(), tmp_path) as (channel, _):
        stub = adapters_pb2_grpc.AdaptersStub(channel)
        listed = (await stub.ListAdapters(adapters_pb2.ListAdaptersRequest())).adapters
        assert {adapter.revision: list(adapter.aliases) for adapter in listed} == {
            one.revision: ["help"],
            two.revision: [],
        }
        flipped = await stub.SetAlias(adapters_pb2.SetAliasRequest(alias="help", revision=two.revision))
        assert flipped.revision == two.revision
        answer = await inference_pb2_grpc.InferenceStub(channel).Chat(chat("help"))
        assert answer.model == two.revision


async def test_a_message_over_the_limit_is_resource_exhausted(tmp_path: Path) -> None:
    async with channel_to(FakeEngine(), tmp_path) as (channel, _):
        request = inference_pb2.CompletionRequest(model=BASE, prompt="x" * (9 * 1024 * 1024))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceStub(channel).Complete(request)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_ten_streams_at_once_do_not_mix(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    revisions = [publish(registry, f"adapter{number}").revision for number in range(10)]
    async with channel_to(FakeEngine(max_loras=3, num_tokens=20), tmp_path) as (channel, _):
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def read(revision: str) -> str:
            return "".join([chunk.content async for chunk in stub.ChatStream(chat(revision))])

        texts = await asyncio.gather(*(read(revision) for revision in revisions))
        assert texts == [f"{revision} " * 20 for revision in revisions]
