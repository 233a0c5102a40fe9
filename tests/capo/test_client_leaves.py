"""A client that closes its connection in the middle of a body is nobody's bug, and nobody to answer. One that closes it
before its answer frees its request, whatever it has sent behind it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from capo.access_rules import HTTP_RULES
from tests.capo.guarded import Guarded, filled, guarded
from tests.serve.running import BASE, eventually

BODY = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "hello"}]})
CHAT = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(BODY)}\r\n\r\n{BODY}".encode()
NEXT = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
LARGE = b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000000\r\n\r\n"

WITH_A_BODY = [operation for operation in HTTP_RULES if operation.startswith(("POST", "PUT"))]
ANSWERED_WITHOUT_A_BODY = {"method_not_offered", "not_found"}
"""What routes that read no body, or look at something else first, have said by then."""


async def leave_within_the_body_of(service: Guarded, operation: str) -> None:
    method, _, template = operation.partition(" ")
    head = (
        f"{method} {filled(template)} HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n"
    )
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(f"{head}content-length: 5000\r\n\r\n--".encode())
    await writer.drain()
    await asyncio.sleep(0.02)  # by then the route waits for the rest
    writer.close()
    await writer.wait_closed()


def counted_errors(service: Guarded) -> set[str]:
    samples = (sample for metric in service.metrics.collect() for sample in metric.samples)
    return {sample.labels["code"] for sample in samples if sample.name == "capo_request_errors_total"}


async def test_a_client_that_leaves_within_its_body_is_no_error_on_any_route(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with guarded(tmp_path) as service:
        for operation in WITH_A_BODY:
            await leave_within_the_body_of(service, operation)
        audit = tmp_path / "audit.jsonl"
        await eventually(lambda: audit.exists() and "webhook_endpoints" in audit.read_text())  # the last one
        assert counted_errors(service) <= ANSWERED_WITHOUT_A_BODY
        results = {act["operation"]: act["result"] for act in map(json.loads, audit.read_text().splitlines())}
        assert (results["PUT /v1/aliases/{alias:path}"], results["POST /v1/load_lora_adapter"]) == ("499", "499")
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    "behind", [b"", NEXT, NEXT * 10_000, LARGE + bytes(2_000_000)], ids=["0", "1", "many", "large"]
)
async def test_a_client_that_leaves_frees_its_request_whatever_it_sent_behind_it(tmp_path: Path, behind: bytes) -> None:
    async with guarded(tmp_path) as service:
        service.engine.answer_gate.clear()
        _, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(CHAT)
        await eventually(lambda: service.engine.waiting == 1)
        writer.write(behind)
        async with asyncio.timeout(5):
            await writer.drain()
        writer.close()
        try:
            await eventually(lambda: service.engine.waiting == 0)
        finally:
            service.engine.answer_gate.set()


async def test_what_a_client_sends_ahead_is_answered_in_its_order(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(CHAT + NEXT + CHAT + NEXT.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        async with asyncio.timeout(10):
            answers = (await reader.read()).decode().split("HTTP/1.1 200 OK")
        writer.close()
    assert ["chat.completion" in answer for answer in answers] == [False, True, False, True, False]


async def test_after_too_much_sent_ahead_the_running_request_is_the_last_one_answered(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        service.engine.answer_gate.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(CHAT + LARGE)
        await eventually(lambda: service.engine.waiting == 1)
        writer.write(bytes(300_000))
        for _ in range(100):  # turns of the loop, which is the service's too: by then all of it has been read
            await asyncio.sleep(0)
        service.engine.answer_gate.set()
        async with asyncio.timeout(10):
            answer = (await reader.read()).decode()
        writer.close()
    assert answer.count("HTTP/1.1 ") == 1
    assert "chat.completion" in answer
    assert "\r\nconnection: close\r\n" in answer
