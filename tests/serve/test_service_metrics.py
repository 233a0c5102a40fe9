"""What the service counts and measures about requests, against what was done to them."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc
import pytest

from capo_proto.v1 import inference_pb2 as pb
from registry import Registry, errors
from serve.engine_api import Call, Endpoint
from serve.grpc import answers
from serve.grpc import inference as grpc_inference
from serve.routes import inference as http_inference
from serve.service import Origin, ServingService
from tests.serve.fake_engine import FakeEngine
from tests.serve.grpc_channel import Faces, both_faces, chat
from tests.serve.running import BASE, eventually, publish, running_service
from tests.serve.test_http import ask


class BrokenEngine(FakeEngine):
    async def complete(self, call: Call) -> bytes:
        raise RuntimeError("our bug")


def outcomes(service: ServingService, label: str) -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for metric in service.metrics.outcomes.collect()
        for sample in metric.samples
        if sample.labels["adapter"] == label and sample.value
    }


def waits(service: ServingService, label: str) -> tuple[float, float]:
    """How many were observed, and the seconds of all of them together."""
    samples = {s.name: s.value for m in service.metrics.adapter_wait.labels(label).collect() for s in m.samples}
    return samples["capo_adapter_wait_seconds_count"], samples["capo_adapter_wait_seconds_sum"]


def publish_two(registry_dir: Path) -> tuple[str, str]:
    """The revisions of the adapters ``one`` and ``two``, of which an engine with one slot holds one at a time."""
    registry = Registry(registry_dir)
    return publish(registry, "one").revision, publish(registry, "two").revision


async def test_a_bug_of_ours_is_counted_as_a_server_error(tmp_path: Path) -> None:
    async with running_service(BrokenEngine(), tmp_path) as (client, service):
        assert (await ask(client, BASE)).status_code == 500
        assert outcomes(service, "base") == {"server_error": 1}


async def test_a_client_that_leaves_is_counted_as_cancelled(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running_service(engine, tmp_path) as (_, service):
        engine.answer_gate.clear()
        request = asyncio.create_task(service.complete(Endpoint.CHAT, {"model": BASE}, Origin("http", "r")))
        await eventually(lambda: engine.waiting == 1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert outcomes(service, "base") == {"cancelled": 1}


async def test_the_wait_for_an_adapters_slot_is_measured_and_that_of_the_base_is_not(tmp_path: Path) -> None:
    engine = FakeEngine(max_loras=1)
    one, two = publish_two(tmp_path)
    async with running_service(engine, tmp_path) as (client, service):
        engine.answer_gate.clear()
        first = asyncio.create_task(ask(client, one))
        await eventually(lambda: engine.waiting == 1)
        second = asyncio.create_task(ask(client, two))
        await asyncio.sleep(0.3)
        engine.answer_gate.set()
        assert [(await task).status_code for task in (first, second)] == [200, 200]
        assert (await ask(client, BASE)).status_code == 200
        (num_first, first_seconds), (num_second, second_seconds) = waits(service, "one"), waits(service, "two")
        assert (num_first, num_second) == (1, 1)
        assert second_seconds > 0.25
        assert first_seconds < second_seconds
        assert waits(service, "base") == (0, 0)


async def test_a_wait_for_a_slot_that_was_in_vain_is_measured_too(tmp_path: Path) -> None:
    engine = FakeEngine(max_loras=1)
    one, two = publish_two(tmp_path)
    async with running_service(engine, tmp_path) as (client, service):
        service.pool._max_wait_seconds = 0.3
        engine.answer_gate.clear()
        first = asyncio.create_task(ask(client, one))
        await eventually(lambda: engine.waiting == 1)
        with pytest.raises(errors.UnavailableError) as refusal:
            await service.complete(Endpoint.CHAT, {"model": two}, Origin("http", "r"))
        assert refusal.value.code == "adapter_slots_busy"
        num, seconds = waits(service, "two")
        assert (num, seconds > 0.25) == (1, True)
        engine.answer_gate.set()
        assert (await first).status_code == 200


async def test_who_waits_for_a_verdict_on_a_schema_holds_no_slot(tmp_path: Path) -> None:
    engine = FakeEngine(max_loras=1)
    one, two = publish_two(tmp_path)
    async with running_service(engine, tmp_path) as (client, service):
        engine.check_gate.clear()
        first = asyncio.create_task(ask(client, one))
        await eventually(lambda: service.metrics.in_flight.labels("one")._value.get() == 1)
        await asyncio.sleep(0.1)
        assert engine.loads == []
        engine.check_gate.set()
        assert (await ask(client, two)).status_code == 200
        assert (await first).status_code == 200
        assert waits(service, "one")[1] < 0.09, "the wait for the verdict is none for the adapter"


def endings(service: ServingService) -> dict[tuple[str, str], float]:
    return {
        (sample.labels["protocol"], sample.labels["outcome"]): sample.value
        for metric in service.metrics.requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.value
    }


async def ask_grpc(faces: Faces, *, stream: bool, **fields: object) -> None:
    """How it is answered does not matter."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        if stream:
            async for _ in faces.inference.ChatStream(chat(BASE, **fields)):
                pass
        else:
            await faces.inference.Chat(chat(BASE, **fields))


async def ask_both(faces: Faces, *, stream: bool) -> None:
    await ask(faces.http, BASE, stream=stream)
    await ask_grpc(faces, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
async def test_every_request_is_counted_once_on_either_face(tmp_path: Path, stream: bool) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        await ask_both(faces, stream=stream)
        assert endings(faces.service) == {("http", "ok"): 1, ("grpc", "ok"): 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_request_policy_refuses_is_counted_too(tmp_path: Path, stream: bool) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        assert (await ask(faces.http, BASE, stream=stream, n=99)).status_code == 400
        await ask_grpc(faces, stream=stream, sampling=pb.Sampling(n=99))
        assert endings(faces.service) == {("http", "client_error"): 1, ("grpc", "client_error"): 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_in_the_check_of_a_request_is_a_server_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("our bug")

    monkeypatch.setattr(http_inference, "parse_body", crash)
    monkeypatch.setattr(grpc_inference, "check_body", crash)
    async with both_faces(FakeEngine(), tmp_path) as faces:
        await ask_both(faces, stream=stream)
        assert endings(faces.service) == {("http", "server_error"): 1, ("grpc", "server_error"): 1}


@pytest.mark.parametrize(("stream", "broken"), [(False, "chat_response"), (True, "chat_piece")])
async def test_a_bug_in_the_making_of_an_answer_is_a_server_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, broken: str
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("our bug")

    monkeypatch.setattr(answers, broken, crash)
    async with both_faces(FakeEngine(), tmp_path) as faces:
        await ask_both(faces, stream=stream)
        assert endings(faces.service) == {("http", "ok"): 1, ("grpc", "server_error"): 1}


async def test_a_stream_that_fails_late_is_a_server_error_though_its_status_was_good(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.fail_after_tokens = 2
    async with both_faces(engine, tmp_path) as faces:
        answer = await ask(faces.http, BASE, stream=True)
        assert answer.status_code == 200
        assert "[DONE]" not in answer.text
        assert endings(faces.service) == {("http", "server_error"): 1}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_a_request_whose_client_leaves_counts_as_cancelled(tmp_path: Path, protocol: str, stream: bool) -> None:
    engine = FakeEngine()
    engine.answer_gate.clear()
    async with both_faces(engine, tmp_path) as faces:
        asks = ask(faces.http, BASE, stream=stream) if protocol == "http" else ask_grpc(faces, stream=stream)
        asked = asyncio.create_task(asks)
        await eventually(lambda: engine.waiting == 1)
        asked.cancel()
        await eventually(lambda: endings(faces.service) != {})
        assert endings(faces.service) == {(protocol, "cancelled"): 1}
        await asyncio.gather(asked, return_exceptions=True)
