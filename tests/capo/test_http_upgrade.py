"""Clients that offer another protocol with their request, on raw sockets: they are answered in HTTP/1.1."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from tests.capo.guarded import Guarded, guarded

H2C = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAAAAMAAAAA"}
"""As the JDK's HttpClient and ``curl --http2`` ask."""
WEBSOCKET = {"Upgrade": "websocket", "Connection": "keep-alive, upgrade", "Sec-WebSocket-Version": "13"}
SMUGGLED = b"GET /v1/models/smuggled HTTP/1.1\r\nhost: localhost\r\n\r\n"


def asking_for(model: str) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}]}).encode()


def post(body: bytes, offer: dict[str, str], *, chunks: int | None = None) -> bytes:
    """``chunks``: how many bytes each has, for a body whose length is not told before."""
    if chunks is None:
        framing, sent = f"Content-Length: {len(body)}", body
    else:
        pieces = [body[start : start + chunks] for start in range(0, len(body), chunks)]
        framing = "Transfer-Encoding: chunked"
        sent = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
    fields = [f"{name}: {value}" for name, value in offer.items()]
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "X-Empty:", *fields, framing]
    return "\r\n".join([*lines, "", ""]).encode() + sent


def last_get(model: str) -> bytes:
    return f"GET /v1/models/{model} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()


async def answers_to(service: Guarded, pieces: list[bytes]) -> list[tuple[int, str]]:
    """Status and body of each answer, until the service closes the connection; the pieces come one after the other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.005)
    async with asyncio.timeout(10):
        received = (await reader.read()).decode()
    writer.close()
    return [
        (int(status), rest) for status, rest in re.findall(r"HTTP/1\.1 (\d+) (.*?)(?=HTTP/1\.1 |\Z)", received, re.S)
    ]


def cut(sent: bytes, every: int) -> list[bytes]:
    return [sent[start : start + every] for start in range(0, len(sent), every)]


def are_about(answers: list[tuple[int, str]], *models: str) -> bool:
    """Every request got one answer, in order, that names the model it asked for."""
    return [status for status, _ in answers] == [404] * len(models) and all(
        f"'{model}'" in body for model, (_, body) in zip(models, answers, strict=True)
    )


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("chunks", [None, 25], ids=["length", "chunked"])
async def test_a_request_that_offers_another_protocol_is_read_whole(
    tmp_path: Path, offer: dict[str, str], chunks: int | None
) -> None:
    first, second = (post(asking_for(model), offer, chunks=chunks) for model in ("first", "second"))
    sent = first + second + last_get("third")
    head = first.index(b"\r\n\r\n") + 4
    async with guarded(tmp_path) as service:
        for pieces in ([sent], [sent[:head], sent[head:]], [sent[: head + 9], sent[head + 9 :]], cut(sent, 33)):
            answers = await answers_to(service, pieces)
            assert are_about(answers, "first", "second", "third"), answers


async def test_a_body_behind_such_a_head_is_never_another_request(tmp_path: Path) -> None:
    sent = post(SMUGGLED, H2C)
    head = sent.index(b"\r\n\r\n") + 4
    async with guarded(tmp_path) as service:
        for pieces in ([sent + last_get("last")], [sent[:head], sent[head:], last_get("last")]):
            (status, refusal), last = await answers_to(service, pieces)
            assert (status, json.loads(refusal.partition("\r\n\r\n")[2])["error"]["code"]) == (400, "invalid_json")
            assert are_about([last], "last")


async def test_two_lengths_in_such_a_head_are_refused_as_in_any_other(tmp_path: Path) -> None:
    """A proxy might take the other one."""
    sent = post(SMUGGLED, {"Content-Length": "0", **H2C})
    async with guarded(tmp_path) as service:
        [(status, _)] = await answers_to(service, [sent + last_get("last")])
        assert status == 400


async def test_an_offer_is_no_way_around_the_bound_on_heads(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        [(status, _)] = await answers_to(service, [post(b"{}", {**H2C, "X-Much": "x" * 100_000})])
        assert status == 431


async def test_a_tunnel_is_refused(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        sent = b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost:80\r\n\r\n"
        for pieces in ([sent + SMUGGLED], [sent, SMUGGLED]):
            [(status, body)] = await answers_to(service, pieces)
            assert (status, "invalid_http" in body) == (400, True)
