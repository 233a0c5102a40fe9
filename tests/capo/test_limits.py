"""What arrives before anybody reads it: heads, chunks, compressed bodies and forms, on a raw socket."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from capo_proto.v1 import inference_pb2
from serve import faces
from tests.capo.guarded import Guarded, guarded
from tests.serve.running import BASE
from tests.sizes import size

MEBIBYTE = 1024 * 1024


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path) as opened:
        yield opened


async def exchange(service: Guarded, sent: Iterator[bytes]) -> tuple[int, bytes]:
    """Send until all is sent or the server has had enough; the status and the body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)

    async def send() -> None:
        for piece in sent:
            writer.write(piece)
            await writer.drain()

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(60):
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            body = await reader.readexactly(int(lengths[0].partition(b":")[2])) if lengths else b""
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()
    return int(head.split()[1]), body


def code_of(body: bytes) -> str:
    return str(json.loads(body)["error"]["code"])


async def growth_of_memory(work: Callable[[], object]) -> float:
    """Mebibytes that this process, the server, keeps after the second time."""
    await work()  # type: ignore[misc]
    before = psutil.Process().memory_info().rss
    await work()  # type: ignore[misc]
    return (psutil.Process().memory_info().rss - before) / MEBIBYTE


LARGE = b"x" * (64 * 1024)
HEADS = {
    "one value": [b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx-long: " + LARGE + b"\r\n\r\n"],
    "many headers": [b"GET /livez HTTP/1.1\r\n" + b"".join(b"x-%d: abc\r\n" % n for n in range(3000)) + b"\r\n"],
    "one name": [b"GET /livez HTTP/1.1\r\n" + LARGE + b": 1\r\n\r\n"],
    "the path": [b"GET /" + LARGE + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"],
    "a value without an end": [b"GET /livez HTTP/1.1\r\nx-long: ", *[b"x" * 1000] * 200],
    "a path without an end": [b"GET /", *[b"x" * 1000] * 200],
}


async def test_a_head_of_more_than_16_kib_is_431(service: Guarded) -> None:
    for what, sent in HEADS.items():
        status, body = await exchange(service, iter(sent))
        assert (status, code_of(body)) == (431, "headers_too_large"), what
        assert (await service.ask("GET /readyz", None)).status == 200


async def test_a_head_below_16_kib_is_read_and_so_is_the_next_one_on_the_connection(service: Guarded) -> None:
    value = "x" * (faces.MAX_HEAD_BYTES - 1000)
    for _ in range(3):
        assert (await service.ask("GET /livez", None, headers={"x-long": value})).status == 200
    small = b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 8000 + b"\r\n\r\n"
    assert (await exchange(service, iter([small * 4])))[0] == 200, "four requests at once are four heads"


async def test_metadata_of_more_than_16_kib_is_refused_by_grpc(service: Guarded) -> None:
    call = service.channel.unary_unary("/capo.v1.Inference/ListModels")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"", metadata=(("x-long", "x" * 64 * 1024),), timeout=5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await call(b"", timeout=5)


async def test_what_is_no_http_is_400_in_openais_shape(service: Guarded) -> None:
    status, body = await exchange(service, iter([b"HELLO\r\n\r\n"]))
    assert (status, code_of(body)) == (400, "invalid_http")


async def test_a_million_chunks_of_one_byte_cost_no_memory_and_nobody_else_waits(service: Guarded) -> None:
    number = size(100_000, 1_000_000)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    block = b"1\r\n{\r\n" * 1000
    slowest = 0.0

    async def look() -> None:
        nonlocal slowest
        while True:
            began = time.monotonic()
            assert (await service.ask("GET /readyz", None)).status == 200
            slowest = max(slowest, time.monotonic() - began)
            await asyncio.sleep(0.02)

    async def send() -> None:
        status, body = await exchange(service, iter([head, *[block] * (number // 1000), b"0\r\n\r\n"]))
        assert (status, code_of(body)) == (400, "invalid_json")

    looking = asyncio.create_task(look())
    grown = await growth_of_memory(send)
    looking.cancel()
    assert grown < 16
    assert slowest < 1.0


async def test_a_body_without_an_end_is_cut_off_at_its_limit(service: Guarded) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    endless = iter([head, *[piece] * 1000])
    status, body = await exchange(service, endless)
    assert (status, code_of(body)) == (413, "too_large")
    assert len(list(endless)) > 500, "most of it was never sent"


async def test_a_compressed_body_is_refused_before_it_is_read(service: Guarded) -> None:
    bomb = gzip.compress(b"\0" * size(64 * MEBIBYTE, 1024 * MEBIBYTE))

    async def send() -> None:
        for path in ("/v1/chat/completions", "/v1/files", "/v1/fine_tuning/jobs", "/v1/load_lora_adapter"):
            for encoding in ("gzip", "deflate", "br", "GZIP", "gzip, identity"):
                answer = await service.ask(f"POST {path}", None, content=bomb, headers={"Content-Encoding": encoding})
                assert (answer.status, answer.code) == (400, "content_encoding")

    assert await growth_of_memory(send) < 16


async def test_a_compressed_grpc_message_larger_than_the_limit_is_refused(service: Guarded) -> None:
    text = "a" * size(64 * MEBIBYTE, 512 * MEBIBYTE)
    request = inference_pb2.CompletionRequest(model=BASE, prompt=text).SerializeToString()
    call = service.channel.unary_unary("/capo.v1.Inference/Complete")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(request, compression=grpc.Compression.Gzip, timeout=30)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


FORM = b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n"
CHUNKED = FORM + b"transfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def test_a_form_with_an_endless_preamble_is_cut_off_and_leaves_nothing(service: Guarded) -> None:
    endless = iter([CHUNKED, *[chunk(b"x" * 0x10000)] * 16_000])

    async def send() -> None:
        status, body = await exchange(service, iter([CHUNKED, *[chunk(b"x" * 0x10000)] * 100]))
        assert (status, code_of(body)) in ((413, "form_too_large"), (400, "invalid_form"))

    status, _ = await exchange(service, endless)
    assert status in (400, 413)
    assert len(list(endless)) > 15_000, "a gigabyte was on offer, and most of it never sent"
    assert await growth_of_memory(send) < 16
    assert [path for path in (service.directory / "files").rglob("*") if path.is_file()] == []


async def test_a_form_of_many_parts_or_of_a_long_part_head_is_refused(service: Guarded) -> None:
    part = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    forms = {
        "many parts": [chunk(part * 1000)] * 100,
        "a long head": [chunk(b'--b\r\ncontent-disposition: form-data; name="'), *[chunk(b"x" * 0x10000)] * 100],
        "many heads": [chunk(b"--b\r\n"), *[chunk(b"x: y\r\n" * 1000)] * 100],
    }
    for what, sent in forms.items():
        status, body = await exchange(service, iter([CHUNKED, *sent, b"0\r\n\r\n"]))
        assert status in (400, 413), (what, body)
    announced = FORM + b"content-length: %d\r\n\r\n" % (1024 * MEBIBYTE)
    status, body = await exchange(service, iter([announced]))
    assert (status, code_of(body)) == (413, "file_too_large"), "it is refused by its announcement"
