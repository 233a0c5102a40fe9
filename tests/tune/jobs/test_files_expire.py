"""Files with ``expires_after``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.tune.jobs.support import Place, chat_rows
from tests.tune.jobs.test_jobs_api import assert_no_wrong_typed_field
from tune.jobs.file_store import FileStore

HOUR = 3600


def test_a_file_shows_when_it_expires(client: OpenAI) -> None:
    made = client.files.create(
        file=("rows.jsonl", chat_rows(12)),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": HOUR},
    )
    assert_no_wrong_typed_field(made)
    assert made.expires_at == made.created_at + HOUR
    assert client.files.retrieve(made.id) == made


def expired(place: Place) -> str:
    """The id of a file whose hour is over."""
    record = place.upload(chat_rows(12))
    place.file_rows.delete(record.id)
    again = replace(record, id=f"{record.id}-old", expires_at=record.created_at - 1)
    place.files.storage.path(record.id).rename(place.files.storage.path(again.id))
    place.file_rows.add(again)
    return again.id


def test_an_expired_file_is_as_if_deleted_and_its_bytes_go_with_the_next_upload(client: OpenAI, place: Place) -> None:
    old = expired(place)
    assert [file.id for file in client.files.list()] == []
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(old)
    new = client.files.create(file=("rows.jsonl", chat_rows(12)), purpose="fine-tune")
    assert place.stored_files() == [new.id]


def test_an_open_job_keeps_its_file(any_place: Place) -> None:
    place = any_place
    file = place.upload(chat_rows(12))
    later = FileStore(place.database, tenant=place.file_rows.tenant, clock=lambda: file.created_at + 2.0 * HOUR)
    place.file_rows.delete(file.id)
    place.file_rows.add(replace(file, id="file-short", expires_at=file.created_at + HOUR))
    job = place.queue_job("file-short")
    assert later.take_expired() == []
    assert later.get("file-short").id == "file-short"
    place.store.cancel(job.id)
    assert later.take_expired() == ["file-short"]


@pytest.mark.parametrize(
    "expiry",
    [
        {"anchor": "last_active_at", "seconds": HOUR},
        {"anchor": "created_at", "seconds": HOUR - 1},
        {"anchor": "created_at", "seconds": 30 * 24 * HOUR + 1},
        {"anchor": "created_at"},
        {"seconds": HOUR},
    ],
)
def test_a_wrong_expiry_is_refused_and_leaves_nothing(client: OpenAI, place: Place, expiry: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"expires_after\["):
        client.files.create(file=("rows.jsonl", chat_rows(12)), purpose="fine-tune", expires_after=expiry)
    assert place.stored_files() == []
