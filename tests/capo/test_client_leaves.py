"""A client that closes its connection in the middle of a body: nobody's bug, and nobody to answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from capo.access_rules import HTTP_RULES
from tests.capo.guarded import Guarded, filled, guarded
from tests.serve.running import eventually

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
        await eventually(lambda: "webhook_endpoints" in audit.read_text())  # the last one
        assert counted_errors(service) <= ANSWERED_WITHOUT_A_BODY
        results = {act["operation"]: act["result"] for act in map(json.loads, audit.read_text().splitlines())}
        assert (results["PUT /v1/aliases/{alias:path}"], results["POST /v1/load_lora_adapter"]) == ("499", "499")
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
