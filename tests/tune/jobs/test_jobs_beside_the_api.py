"""What runs beside the API: it tidies up, and goes on after a fault."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from tests.tune.jobs.support import TENANT, Place, add_file_row, wait_until
from tune.jobs import api
from tune.jobs.uploads.store import LIFE_SECONDS, UploadStore


async def test_expired_files_and_uploads_go_by_themselves_even_after_a_fault(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(api, "TIDY_SECONDS", 0.01)
    monkeypatch.setattr(api, "_RESTART_SECONDS", 0.01)
    tidy, storage = place.api.files.remove_expired, place.api.files.storage
    faults = [RuntimeError("unforeseen"), OSError("of the disk")]

    def fails_at_first() -> None:
        if faults:
            raise faults.pop()
        tidy()

    monkeypatch.setattr(place.api.files, "remove_expired", fails_at_first)
    old = add_file_row(place.file_rows, expires_at=1)
    storage.path(old).write_text("x")
    late = UploadStore(
        place.database, max_part_bytes=10, tenant=TENANT, clock=lambda: time.time() - LIFE_SECONDS - 1
    ).create(filename="a", purpose="fine-tune", size_bytes=5, file_expires_after_seconds=None)
    with storage.receive_part(late.id) as part:
        part.write(b"12345")
        part.keep("part_late")
    assert len(place.stored_files()) == 2
    with caplog.at_level(logging.ERROR):
        task = asyncio.create_task(place.api.run())
        await asyncio.to_thread(wait_until, lambda: place.stored_files() == [], seconds=10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert "unforeseen" in caplog.text
    assert not faults
