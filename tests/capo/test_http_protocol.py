"""Answers to clients of HTTP/1.0, on a raw socket: they take whatever stands between head and end for the body."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.capo.guarded import Guarded, guarded
from tests.serve.running import BASE

HELLO = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


async def answer_to(service: Guarded, version: str, body: Any) -> tuple[dict[str, str], str]:
    """Headers, and everything after them until the server closes the connection."""
    sent = json.dumps(body)
    head = f"POST /v1/chat/completions HTTP/{version}\r\nhost: localhost\r\ncontent-length: {len(sent)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(f"{head}connection: close\r\n\r\n{sent}".encode())
    async with asyncio.timeout(10):
        received, _, rest = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    status, *lines = received.split("\r\n")
    assert status.endswith("200 OK")
    return dict(line.split(": ", 1) for line in lines), rest


async def test_a_stream_to_a_client_of_http_1_0_comes_bare_and_ends_with_the_connection(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        headers, events = await answer_to(service, "1.0", {**HELLO, "stream": True})
        assert "transfer-encoding" not in headers
        assert "content-length" not in headers
        assert headers["connection"] == "close"
        *chunks, done, end = events.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        assert len(chunks) > 1
        assert all(json.loads(chunk.removeprefix("data: "))["object"] == "chat.completion.chunk" for chunk in chunks)


async def test_a_client_of_http_1_0_need_not_name_the_host_and_a_web_page_cannot_pass_for_one(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        for fields, status in (
            ("", 200),
            ("host: localhost\r\n", 200),
            ("host: evil.example\r\n", 403),
            ("host:\r\n", 403),
            ("origin: http://evil.example\r\n", 403),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(f"GET /v1/models HTTP/1.0\r\n{fields}\r\n".encode())
            async with asyncio.timeout(10):
                answer = (await reader.read()).decode()
            writer.close()
            assert answer.startswith(f"HTTP/1.1 {status} "), (fields, answer)


async def test_an_answer_in_one_piece_has_its_length_for_every_client(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        for version in ("1.0", "1.1"):
            headers, body = await answer_to(service, version, HELLO)
            assert headers["content-length"] == str(len(body.encode()))
            assert json.loads(body)["object"] == "chat.completion"


async def test_a_stream_to_a_client_of_http_1_1_comes_in_chunks(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        headers, chunks = await answer_to(service, "1.1", {**HELLO, "stream": True})
        assert headers["transfer-encoding"] == "chunked"
        assert chunks.endswith("\r\n0\r\n\r\n")
