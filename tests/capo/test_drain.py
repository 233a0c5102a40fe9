"""The end of a service beside inference: who is let in, who is waited for, and how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from capo.access import Door
from capo_proto.v1 import inference_pb2, tuning_pb2
from tests.capo.guarded import Guarded, bearer, guarded
from tests.serve.running import BASE, eventually
from tests.tune.jobs.support import chat_rows

HEADERS = {"content-type": "multipart/form-data; boundary=x"}
HEAD = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
)


def door_of(service: Guarded) -> Door:
    assert isinstance(service.door, Door)
    return service.door


async def an_upload(go_on: asyncio.Event) -> AsyncIterator[bytes]:
    yield HEAD
    await go_on.wait()
    yield chat_rows(12) + b"\r\n--x--\r\n"


async def begun(service: Guarded, key: str, go_on: asyncio.Event) -> asyncio.Task[int]:
    """An upload that is inside; its task's result is its status."""

    async def upload() -> int:
        answer = await service.http.post(
            "/v1/files", content=an_upload(go_on), headers=HEADERS | {"authorization": key}
        )
        return answer.status_code

    task = asyncio.create_task(upload())
    await eventually(lambda: door_of(service)._in_flight._count == 1)
    return task


async def test_an_upload_that_runs_ends_well_and_nothing_new_begins_on_either_face(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key, go_on = bearer(service.key()), asyncio.Event()
        upload = await begun(service, key, go_on)
        drain = asyncio.create_task(door_of(service).drain(30))
        await asyncio.sleep(0)
        for operation in ("POST /v1/files", "GET /v1/files", "GET /v1/models", "POST /v1/fine_tuning/jobs"):
            refused = await service.ask(operation, key)
            assert (refused.status, refused.code) == (503, "draining"), operation
            assert int(refused.headers["retry-after"]) > 0
        for operation in ("/capo.v1.Tuning/CreateJob", "/capo.v1.Tuning/FollowJob", "/capo.v1.Adapters/ListAliases"):
            called = await service.ask(operation, key)
            assert (called.status, called.code) == ("UNAVAILABLE", "draining"), operation
        assert (await service.ask("GET /livez", None)).status == 200
        assert (await service.ask("GET /metrics", key)).status == 200
        assert (await service.ask("/grpc.health.v1.Health/Check", None)).status == "OK"
        assert (await service.ask("GET /v1/files", None)).status == 401, "who has no key learns nothing"
        assert not drain.done()
        go_on.set()
        assert await upload == 200
        assert await drain == 0


async def test_a_new_request_is_refused_beside_inference_as_inference_refuses_it(tmp_path: Path) -> None:
    message = inference_pb2.ChatRequest(model=BASE, messages=[inference_pb2.Message(role="user", content="x")])
    chat = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    async with guarded(tmp_path) as service:
        key = bearer(service.key())
        await asyncio.gather(service.service.drain(1), door_of(service).drain(1))
        chats = await service.ask("POST /v1/chat/completions", key, json=chat)
        jobs = await service.ask("POST /v1/fine_tuning/jobs", key)
        assert chats.body == jobs.body
        assert chats.headers["retry-after"] == jobs.headers["retry-after"]
        called = await service.ask("/capo.v1.Inference/Chat", key, message=message.SerializeToString())
        created = await service.ask("/capo.v1.Tuning/CreateJob", key)
        assert (called.status, called.code, called.body) == (created.status, created.code, created.body)


@pytest.mark.parametrize("seconds", [0.0, 0.3])
async def test_a_drain_waits_no_longer_than_it_may(tmp_path: Path, seconds: float) -> None:
    async with guarded(tmp_path) as service:
        go_on = asyncio.Event()
        upload = await begun(service, bearer(service.key()), go_on)
        started = time.monotonic()
        assert await door_of(service).drain(seconds) == 1
        assert time.monotonic() - started < seconds + 1
        go_on.set()
        assert await upload == 200


async def test_whoever_follows_a_job_for_ever_holds_no_drain(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = bearer(service.key())
        form = {"files": {"file": ("rows.jsonl", chat_rows(12))}, "data": {"purpose": "fine-tune"}}
        file = (await service.ask("POST /v1/files", key, **form)).body["id"]
        body = {"model": BASE, "training_file": file}
        job = (await service.ask("POST /v1/fine_tuning/jobs", key, json=body)).body["id"]
        message = tuning_pb2.FollowJobRequest(job_id=job).SerializeToString()
        follow = service.channel.unary_stream("/capo.v1.Tuning/FollowJob")(message, metadata=(("authorization", key),))
        assert await follow.read(), "it has begun"
        async with asyncio.timeout(5):
            assert await door_of(service).drain(30) == 0
        follow.cancel()
