"""How the gRPC face behaves beside answering: ids, limits, clients that leave or stall, health, reflection."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import capo_proto.v1
from capo_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from registry import Registry
from serve.engine_api import Call
from tests.serve.fake_engine import FakeEngine
from tests.serve.grpc_channel import Faces, both_faces, chat
from tests.serve.running import BASE, eventually, publish

GENERATED = re.compile(r"req-[0-9a-f]{24}")


def is_anything_held(faces: Faces) -> bool:
    return any(resident.users for resident in faces.service.pool.residents())


class RecordingEngine(FakeEngine):
    """Keeps the calls that reached it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[Call] = []

    async def complete(self, call: Call) -> bytes:
        self.calls.append(call)
        return await super().complete(call)


@pytest.mark.parametrize("given", ["my-id.1", "A" * 64])
async def test_a_clients_own_request_id_is_used_and_returned(tmp_path: Path, given: str) -> None:
    engine = RecordingEngine()
    async with both_faces(engine, tmp_path) as faces:
        call = faces.inference.Chat(chat(BASE), metadata=(("x-request-id", given),))
        answer = await call
        assert dict(await call.initial_metadata())["x-request-id"] == given
        assert answer.id == f"chatcmpl-{given}"
        assert engine.calls[0].request_id == given


@pytest.mark.parametrize("given", [None, "a b", "x" * 65, "a/b", "a:b", "%0a", ""])
async def test_any_other_request_id_is_replaced_as_over_http(tmp_path: Path, given: str | None) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        headers = {} if given is None else {"x-request-id": given}
        over_http = await faces.http.get("/livez", headers=headers)
        call = faces.inference.Chat(chat(BASE), metadata=tuple(headers.items()))
        await call
        for used in (over_http.headers["x-request-id"], dict(await call.initial_metadata())["x-request-id"]):
            assert GENERATED.fullmatch(used)


async def test_errors_streams_and_other_services_carry_a_request_id_too(tmp_path: Path) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        adapters = adapters_pb2_grpc.AdaptersStub(faces.channel)
        for call in (
            faces.inference.Chat(chat("nope")),
            faces.inference.ChatStream(chat("nope")),
            faces.inference.ChatStream(chat(BASE)),
            adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()),
        ):
            assert GENERATED.fullmatch(dict(await call.initial_metadata())["x-request-id"])


async def test_trace_context_reaches_the_engine_and_other_metadata_does_not(tmp_path: Path) -> None:
    engine = RecordingEngine()
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    async with both_faces(engine, tmp_path) as faces:
        await faces.inference.Chat(chat(BASE), metadata=(*trace.items(), ("x-vllm-priority", "9")))
        assert engine.calls[0].trace_headers == trace


async def test_an_unknown_field_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    newer = inference_pb2.Sampling.FromString(b"\x98\x7d\x01")  # field 2003, a varint
    inner = inference_pb2.Message.FromString(b"\x98\x7d\x01")
    async with both_faces(FakeEngine(), tmp_path) as faces:
        for request, where in (
            (inference_pb2.ChatRequest.FromString(b"\x98\x7d\x01"), "capo.v1.ChatRequest"),
            (chat(BASE, sampling=newer), "capo.v1.Sampling"),
            (inference_pb2.ChatRequest(model=BASE, messages=[inner]), "capo.v1.Message"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=f"2003 of {where} is not known") as caught:
                await faces.inference.Chat(request)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert dict(caught.value.trailing_metadata())["capo-error-code"] == "unknown_field"


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\x02\xc3\x28", b"\x0a\x7f"])
async def test_bytes_that_are_no_request_are_an_invalid_argument(tmp_path: Path, raw: bytes) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        for method, kind in (("Chat", faces.channel.unary_unary), ("ChatStream", faces.channel.unary_stream)):
            call = kind(f"/capo.v1.Inference/{method}")(raw)
            assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert dict(await call.trailing_metadata())["capo-error-code"] == "invalid_message"
        assert (await faces.inference.Chat(chat(BASE))).choices


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_message_over_the_limit_is_refused_however_small_it_travels(
    tmp_path: Path, compression: grpc.Compression
) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        request = inference_pb2.CompletionRequest(model=BASE, prompt="x" * (64 * 1024 * 1024))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await faces.inference.Complete(request, compression=compression)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in (caught.value.details() or "")


async def test_a_message_just_below_the_limit_is_answered(tmp_path: Path) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        request = inference_pb2.CompletionRequest(model=BASE, prompt="x" * (8 * 1024 * 1024 - 100))
        assert (await faces.inference.Complete(request)).choices


@pytest.mark.parametrize("method", ["Chat", "ChatStream"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_call_that_is_given_up_is_aborted_within_a_second(tmp_path: Path, method: str, how: str) -> None:
    engine = FakeEngine(num_tokens=1000)
    artifact = publish(Registry(tmp_path), "support")
    async with both_faces(engine, tmp_path) as faces:
        engine.answer_gate.clear()
        call = getattr(faces.inference, method)(chat(artifact.revision), timeout=0.3 if how == "deadline" else None)
        asking = asyncio.ensure_future(call if method == "Chat" else anext(aiter(call)))
        await eventually(lambda: engine.waiting == 1)
        if how == "cancel":
            call.cancel()
        await eventually(lambda: engine.waiting == 0 and not is_anything_held(faces), seconds=1.3)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await asking


async def test_a_client_that_stops_reading_frees_its_adapter_and_learns_why_when_it_reads_on(tmp_path: Path) -> None:
    engine = FakeEngine(num_tokens=100_000)  # far more than flow control lets through unread
    artifact = publish(Registry(tmp_path), "support")
    small_window = [("grpc.http2.bdp_probe", 0)]
    async with (
        both_faces(engine, tmp_path, stalled_reader_seconds=0.3) as faces,
        grpc.aio.insecure_channel(faces.address, options=small_window) as channel,
    ):
        stream = aiter(inference_pb2_grpc.InferenceStub(channel).ChatStream(chat(artifact.revision)))
        await anext(stream)
        await eventually(lambda: not is_anything_held(faces), seconds=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            assert all([chunk.finish_reason == 0 async for chunk in stream])
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert dict(caught.value.trailing_metadata())["capo-error-code"] == "stalled_reader"
        other = faces.inference.Chat(chat(BASE))
        engine._num_tokens = 3
        assert (await other).choices


async def test_a_model_that_is_silent_for_long_is_not_taken_for_a_client_that_stalls(tmp_path: Path) -> None:
    engine = FakeEngine(num_tokens=3)
    async with both_faces(engine, tmp_path, stalled_reader_seconds=0.1) as faces:
        engine.answer_gate.clear()
        reading = asyncio.create_task(_texts(faces.inference.ChatStream(chat(BASE))))
        await asyncio.sleep(0.5)
        engine.answer_gate.set()
        assert "".join(await reading) == "base base base "


async def _texts(stream: Any) -> list[str]:
    return [chunk.content async for chunk in stream]


async def test_watching_health_shows_every_turn_and_an_unknown_service(tmp_path: Path) -> None:
    serving = health_pb2.HealthCheckResponse
    async with both_faces(FakeEngine(), tmp_path) as faces:
        health = health_pb2_grpc.HealthStub(faces.channel)
        for service in ("", "capo.v1.Inference", "capo.v1.Adapters"):
            watch = aiter(health.Watch(health_pb2.HealthCheckRequest(service=service)))
            assert (await anext(watch)).status == serving.SERVING
            for is_serving, status in ((False, serving.NOT_SERVING), (True, serving.SERVING)):
                await faces.server.set_serving(is_serving)
                assert (await anext(watch)).status == status
        unknown = aiter(health.Watch(health_pb2.HealthCheckRequest(service="nope")))
        assert (await anext(unknown)).status == serving.SERVICE_UNKNOWN
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nope"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_every_service_that_is_defined(tmp_path: Path) -> None:
    defined = {"grpc.health.v1.Health"}
    for module in pkgutil.iter_modules(capo_proto.v1.__path__):
        # Tuning is another room's, which capo passes in (tests/tune/jobs/test_jobs_grpc.py).
        if module.name.endswith("_pb2") and module.name != "tuning_pb2":
            descriptor = importlib.import_module(f"capo_proto.v1.{module.name}").DESCRIPTOR
            defined |= {service.full_name for service in descriptor.services_by_name.values()}
    async with both_faces(FakeEngine(), tmp_path) as faces:
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        replies = reflection_pb2_grpc.ServerReflectionStub(faces.channel).ServerReflectionInfo(iter(requests))
        listed = {service.name async for reply in replies for service in reply.list_services_response.service}
        assert len(defined) >= 3
        assert defined <= listed


async def test_a_bug_of_ours_is_opaque_to_the_client(tmp_path: Path) -> None:
    class BrokenEngine(FakeEngine):
        async def complete(self, call: Call) -> bytes:
            raise RuntimeError("a secret detail")

    async with both_faces(BrokenEngine(), tmp_path) as faces:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await faces.inference.Chat(chat(BASE))
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in f"{caught.value.details()}{caught.value.trailing_metadata()}"


async def test_models_are_listed_as_over_http(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    publish(registry, "support", alias="help", fine_tuned_name="ft:capo-tiny:capo:support:abcd1234")
    async with both_faces(FakeEngine(), tmp_path) as faces:
        over_http = (await faces.http.get("/v1/models")).json()["data"]
        over_grpc = (await faces.inference.ListModels(inference_pb2.ListModelsRequest())).models
        assert len(over_http) == 3
        assert [(m["id"], m["revision"] or "", m["parent"] or "", m["created"]) for m in over_http] == [
            (model.id, model.revision, model.parent, model.created_at) for model in over_grpc
        ]
