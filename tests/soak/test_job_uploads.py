"""Many uploads at once: the service's memory stays flat, every file is whole, and what is cut off leaves nothing."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from tests.sizes import size
from tests.soak import job_service
from tests.soak.figures import Figures
from tests.soak.job_service import JobService

UPLOADS = size(10, 100)
FILE_BYTES = size(5, 50) * 1024 * 1024
CUT_OFF = size(2, 10)
CHECKS_AT_ONCE = min(32, (os.cpu_count() or 1) + 4)
"""Files of more than a megabyte are checked in processes of their own: one for each of asyncio's default threads."""
MOST_GROWTH_BYTES = (150 + CHECKS_AT_ONCE * 30) * 1024 * 1024
"""Whatever is sent: a megabyte or two of each upload is on its way to the disk, and a check is a Python with our rules
for rows, which reads line by line."""
_BOUNDARY = "capo-boundary"
_HEAD = (
    f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
).encode()
_TAIL = f"\r\n--{_BOUNDARY}--\r\n".encode()


def block(number: int) -> bytes:
    """About 64 KiB of rows."""
    text = "word " * 790
    rows = (
        {"messages": [{"role": "user", "content": f"{number} {row} {text}"}, {"role": "assistant", "content": "yes"}]}
        for row in range(16)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


async def body(rows: bytes, *, is_cut_off: bool) -> AsyncIterator[bytes]:
    yield _HEAD
    blocks = FILE_BYTES // len(rows)
    for number in range(blocks):
        if is_cut_off and number == blocks // 2:
            raise ConnectionAbortedError("this client goes away")
        yield rows
        await asyncio.sleep(0)
    yield _TAIL


async def upload(http: httpx.AsyncClient, number: int, *, is_cut_off: bool = False) -> tuple[str, str] | None:
    """The file's id and the digest of what was sent; ``None`` for one that was cut off."""
    rows = block(number)
    headers = {"content-type": f"multipart/form-data; boundary={_BOUNDARY}"}
    try:
        answer = await http.post("/v1/files", content=body(rows, is_cut_off=is_cut_off), headers=headers)
    except ConnectionAbortedError:
        return None
    assert answer.status_code == 200, answer.text
    digest = hashlib.sha256()
    for _ in range(FILE_BYTES // len(rows)):
        digest.update(rows)
    return answer.json()["id"], digest.hexdigest()


async def peak_bytes(service: JobService) -> int:
    """The largest resident size, children included, until the task is cancelled."""
    peak = 0
    try:
        while True:
            peak = max(peak, await asyncio.to_thread(service.resident_bytes))
            await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        return peak


async def test_memory_is_flat_and_what_is_cut_off_leaves_nothing(tmp_path: Path, figures: Figures) -> None:
    with job_service.running(tmp_path, workers=0) as service:
        limits = httpx.Limits(max_connections=UPLOADS + CUT_OFF)
        async with httpx.AsyncClient(base_url=service.url, timeout=900, limits=limits, trust_env=False) as http:
            await upload(http, 0)
            before = service.resident_bytes()
            watch = asyncio.create_task(peak_bytes(service))
            await asyncio.sleep(0)
            started = time.monotonic()
            uploads = [upload(http, number, is_cut_off=number < CUT_OFF) for number in range(UPLOADS + CUT_OFF)]
            made = [result for result in await asyncio.gather(*uploads) if result is not None]
            seconds = time.monotonic() - started
            watch.cancel()
            growth = await watch - before
            assert len(made) == UPLOADS
            await _until_only(service, {file_id for file_id, _ in made}, but=1)
            for file_id, digest in made[:: max(1, UPLOADS // 10)]:
                sent = hashlib.sha256()
                async with http.stream("GET", f"/v1/files/{file_id}/content") as answer:
                    async for chunk in answer.aiter_bytes():
                        sent.update(chunk)
                assert sent.hexdigest() == digest
    figures.record(
        "uploads at once",
        uploads=UPLOADS,
        megabytes_each=FILE_BYTES // 2**20,
        cut_off=CUT_OFF,
        growth_megabytes=growth / 2**20,
        seconds=seconds,
    )
    assert growth < MOST_GROWTH_BYTES


async def _until_only(service: JobService, ids: set[str], *, but: int) -> None:
    """Wait until nothing lies in the files directory but these and ``but`` others: who was cut off is noticed late."""
    directory = service.directory / "data" / "files"
    async with asyncio.timeout(30):
        while True:
            left = {path.name for path in directory.rglob("*") if path.is_file()}
            if ids <= left and len(left - ids) == but:
                return
            await asyncio.sleep(0.1)
