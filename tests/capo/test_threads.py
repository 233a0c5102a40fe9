"""Work of the jobs API that takes long, or for ever, holds up nothing but itself: each kind has threads of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from registry.errors import NotFoundError
from tests.capo.guarded import Guarded, guarded
from tests.serve.running import eventually
from tests.tune.jobs.support import chat_rows
from tune.data.rows import FileReport
from tune.jobs import check_file, files, routes
from tune.jobs.file_store import FileStore
from tune.jobs.uploads.service import UploadService

MANY = 40
"""More than asyncio ever has threads of its own."""


class Hanging:
    """Calls that come to :meth:`wait` hang until the test is over."""

    def __init__(self) -> None:
        self.num_running = 0
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    def wait(self) -> None:
        with self._lock:
            self.num_running += 1
        assert self._is_over.wait(60)

    @contextlib.asynccontextmanager
    async def requests(self, service: Guarded, method: str, path: str, **options: Any) -> AsyncIterator[None]:
        """Many of these are under way."""
        asked = [asyncio.create_task(service.http.request(method, path, **options)) for _ in range(MANY)]
        try:
            await eventually(lambda: self.num_running > 1)
            await asyncio.sleep(0.2)  # as many more as there are threads
            yield
        finally:
            self._is_over.set()
            await asyncio.gather(*asked)


def form(content: bytes) -> dict[str, Any]:
    return {"files": {"file": ("rows.jsonl", content)}, "data": {"purpose": "fine-tune"}}


async def require_that_serving_goes_on(service: Guarded) -> None:
    async with asyncio.timeout(5):
        assert await asyncio.to_thread(lambda: "ran") == "ran"
        assert (await service.ask("GET /metrics", None)).status == 200
        new = service.publish("support", None).revision
        body = {"model": new, "messages": [{"role": "user", "content": "hello"}]}
        assert (await service.ask("POST /v1/chat/completions", None, json=body)).status == 200


async def test_a_job_store_that_hangs_holds_up_no_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, page = Hanging(), FileStore.page

    def hang(*given: Any, **options: Any) -> Any:
        hanging.wait()
        return page(*given, **options)

    monkeypatch.setattr(FileStore, "page", hang)
    async with guarded(tmp_path) as service, hanging.requests(service, "GET", "/v1/files"):
        await require_that_serving_goes_on(service)


def hang_in_checks(hanging: Hanging, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    def check(path: Path, *, max_rows: int) -> FileReport:
        if path.stat().st_size > 4000:
            hanging.wait()
        return check_file.check_training_file(path, max_rows=max_rows)

    patch.setattr(files, "check_training_file", check)
    patch.setattr(routes, "IN_PLACE_BYTES", 4000)
    return {"path": "/v1/files", **form(chat_rows(200))}


def hang_in_completing(hanging: Hanging, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    def complete(*_: Any) -> None:
        hanging.wait()
        raise NotFoundError("there is no such upload")

    patch.setattr(UploadService, "complete", complete)
    return {"path": "/v1/uploads/upload_1/complete", "json": {"part_ids": ["part_1"]}}


@pytest.mark.parametrize("hang", [hang_in_checks, hang_in_completing])
async def test_two_large_files_are_checked_at_once_and_hold_up_neither_serving_nor_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang: Callable[[Hanging, pytest.MonkeyPatch], dict[str, Any]]
) -> None:
    hanging = Hanging()
    asked = hang(hanging, monkeypatch)
    async with guarded(tmp_path) as service, hanging.requests(service, "POST", **asked):
        assert hanging.num_running == 2
        await require_that_serving_goes_on(service)
        async with asyncio.timeout(5):
            assert (await service.http.post("/v1/files", **form(chat_rows(10)))).status_code == 200
            assert (await service.ask("GET /v1/files", None)).status == 200
