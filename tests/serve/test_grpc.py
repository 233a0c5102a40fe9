"""Answers over the gRPC face, on a real socket."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from capo_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2
from registry import Registry
from tests.serve.fake_engine import FakeEngine
from tests.serve.grpc_channel import both_faces, chat
from tests.serve.running import BASE, publish


async def test_a_streamed_chat_carries_text_a_finish_reason_and_usage(tmp_path: Path) -> None:
    artifact = publish(Registry(tmp_path), "support", alias="help")
    async with both_faces(FakeEngine(num_tokens=3), tmp_path) as faces:
        chunks = [chunk async for chunk in faces.inference.ChatStream(chat("help"))]
        assert {chunk.model for chunk in chunks} == {artifact.revision}
        assert "".join(chunk.content for chunk in chunks) == f"{artifact.revision} " * 3
        assert chunks[-2].finish_reason == inference_pb2.FINISH_REASON_STOP
        assert chunks[-1].usage.completion_tokens == 3


async def test_a_completion_answers_in_one_piece(tmp_path: Path) -> None:
    async with both_faces(FakeEngine(num_tokens=3), tmp_path) as faces:
        request = inference_pb2.CompletionRequest(model=BASE, prompt="hello")
        answer = await faces.inference.Complete(request)
        assert answer.choices[0].text == "base base base "
        assert answer.usage.completion_tokens == 3


async def test_a_stream_cut_by_the_engines_death_ends_with_a_status_that_is_not_ok(tmp_path: Path) -> None:
    engine = FakeEngine(num_tokens=5)
    async with both_faces(engine, tmp_path) as faces:
        engine.fail_after_tokens = 2
        stream = aiter(faces.inference.ChatStream(chat(BASE)))
        assert [(await anext(stream)).content, (await anext(stream)).content] == ["base ", "base "]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(stream)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_aliases_and_adapters_are_the_same_as_over_http(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    one, two = publish(registry, "support", "one", alias="help"), publish(registry, "support", "two")
    async with both_faces(FakeEngine(), tmp_path) as faces:
        stub = adapters_pb2_grpc.AdaptersStub(faces.channel)
        listed = (await stub.ListAdapters(adapters_pb2.ListAdaptersRequest())).adapters
        assert {adapter.revision: list(adapter.aliases) for adapter in listed} == {
            one.revision: ["help"],
            two.revision: [],
        }
        flipped = await stub.SetAlias(adapters_pb2.SetAliasRequest(alias="help", revision=two.revision))
        assert flipped.revision == two.revision
        answer = await faces.inference.Chat(chat("help"))
        assert answer.model == two.revision


async def test_ten_streams_at_once_do_not_mix(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    revisions = [publish(registry, f"adapter{number}").revision for number in range(10)]
    async with both_faces(FakeEngine(max_loras=3, num_tokens=20), tmp_path) as faces:

        async def read(revision: str) -> str:
            return "".join([chunk.content async for chunk in faces.inference.ChatStream(chat(revision))])

        texts = await asyncio.gather(*(read(revision) for revision in revisions))
        assert texts == [f"{revision} " * 20 for revision in revisions]
