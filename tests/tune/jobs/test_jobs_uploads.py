"""Uploads in parts through the stock SDK: what becomes a file, what is refused, and what is left on the disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Upload

from registry.errors import ConflictError, StorageError
from tests.tune.jobs.sdk_types import assert_no_wrong_typed_field
from tests.tune.jobs.support import BASE, TENANT, Place, chat_rows, client_of, open_place, serve, wait_until
from tune.jobs.uploads.store import LIFE_SECONDS, MAX_PENDING, UploadStore

ROWS = chat_rows(40)


def create(client: OpenAI, size: int = len(ROWS), **changes: Any) -> Upload:
    values: dict[str, Any] = {"filename": "rows.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    return client.uploads.create(bytes=size, **(values | changes))


def add(client: OpenAI, upload: Upload, data: bytes) -> str:
    part = client.uploads.parts.create(upload.id, data=data)
    assert_no_wrong_typed_field(part)
    assert part.upload_id == upload.id
    return part.id


def cut(data: bytes, pieces: int) -> list[bytes]:
    size = -(-len(data) // pieces)
    return [data[start : start + size] for start in range(0, len(data), size)]


class TestAFileInParts:
    def test_the_chunked_helper_of_the_sdk_makes_a_file_that_trains(self, client: OpenAI, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(ROWS)
        upload = client.uploads.upload_file_chunked(
            file=path,
            mime_type="text/jsonl",
            purpose="fine-tune",
            part_size=700,
            md5=hashlib.md5(ROWS, usedforsecurity=False).hexdigest(),
        )
        assert_no_wrong_typed_field(upload)
        assert upload.status == "completed"
        assert upload.file is not None
        assert (upload.file.bytes, upload.file.filename, upload.file.status) == (len(ROWS), "rows.jsonl", "processed")
        assert client.files.retrieve(upload.file.id) == upload.file
        assert client.files.content(upload.file.id).read() == ROWS
        assert client.fine_tuning.jobs.create(model=BASE, training_file=upload.file.id).status == "queued"

    def test_bytes_in_memory_are_cut_by_the_helper_too(self, client: OpenAI) -> None:
        upload = client.uploads.upload_file_chunked(
            file=ROWS, filename="a.jsonl", bytes=len(ROWS), mime_type="text/jsonl", purpose="fine-tune", part_size=999
        )
        assert upload.file is not None
        assert client.files.content(upload.file.id).read() == ROWS

    def test_the_order_is_that_of_the_list_and_not_that_of_arrival(self, client: OpenAI, place: Place) -> None:
        upload = create(client)
        assert_no_wrong_typed_field(upload)
        assert (upload.status, upload.file, upload.expires_at - upload.created_at) == ("pending", None, 3600)
        first, second, third = cut(ROWS, 3)
        with ThreadPoolExecutor(3) as pool:
            ids = list(pool.map(lambda data: add(client, upload, data), (third, first, second)))
        done = client.uploads.complete(upload.id, part_ids=[ids[1], ids[2], ids[0]])
        assert done.file is not None
        assert client.files.content(done.file.id).read() == ROWS
        assert place.stored_files() == [done.file.id]

    def test_a_part_that_was_sent_twice_may_be_left_out(self, client: OpenAI, place: Place) -> None:
        upload = create(client)
        halves = cut(ROWS, 2)
        ids = [add(client, upload, data) for data in (halves[0], halves[0], halves[1])]
        done = client.uploads.complete(upload.id, part_ids=[ids[0], ids[2]])
        assert done.file is not None
        assert place.stored_files() == [done.file.id]

    def test_completing_again_gives_the_same_file(self, client: OpenAI) -> None:
        upload = create(client)
        ids = [add(client, upload, ROWS)]
        first = client.uploads.complete(upload.id, part_ids=ids)
        assert client.uploads.complete(upload.id, part_ids=ids) == first
        assert len(list(client.files.list())) == 1

    def test_of_two_that_complete_at_once_one_makes_the_file(self, any_place: Place) -> None:
        place = any_place
        uploads = place.api.uploads.seen_by(TENANT)
        upload = uploads.create(filename="a", purpose="fine-tune", mime_type="text/jsonl", size_bytes=len(ROWS))
        with uploads.begin_part(upload.id) as part:
            part.write(ROWS)
            made = uploads.finish_part(upload.id, part)

        def complete(_: int) -> str | None:
            try:
                return uploads.complete(upload.id, [made.id])[0].file_id
            except ConflictError:
                return None

        with ThreadPoolExecutor(4) as pool:
            files = set(pool.map(complete, range(8))) - {None}
        assert len(files) == 1
        assert place.stored_files() == [*files]

    def test_the_file_expires_as_it_was_asked_for(self, client: OpenAI) -> None:
        upload = create(client, expires_after={"anchor": "created_at", "seconds": 7200})
        done = client.uploads.complete(upload.id, part_ids=[add(client, upload, ROWS)])
        assert done.file is not None
        assert done.file.expires_at == done.file.created_at + 7200

    async def test_the_asynchronous_client_uploads_too(self, url: str) -> None:
        async with AsyncOpenAI(
            base_url=f"{url}/v1", api_key="unused", http_client=httpx.AsyncClient(trust_env=False)
        ) as client:
            upload = await client.uploads.upload_file_chunked(
                file=ROWS, filename="a", bytes=len(ROWS), mime_type="text/jsonl", purpose="fine-tune", part_size=800
            )
            assert_no_wrong_typed_field(upload)
            other = await client.uploads.create(bytes=5, filename="a", mime_type="text/jsonl", purpose="fine-tune")
            await client.uploads.parts.create(other.id, data=io.BytesIO(b"12345"))
            cancelled = await client.uploads.cancel(other.id)
            assert_no_wrong_typed_field(cancelled)
            assert cancelled.status == "cancelled"


class TestWhatIsRefused:
    def test_other_bytes_than_announced(self, client: OpenAI, place: Place) -> None:
        upload = create(client, len(ROWS) + 1)
        part = add(client, upload, ROWS)
        with pytest.raises(openai.BadRequestError) as refused:
            client.uploads.complete(upload.id, part_ids=[part])
        assert (refused.value.code, refused.value.param) == ("size_mismatch", "part_ids")
        assert len(place.stored_files()) == 1, "the part stays: the upload is still pending"

    @pytest.mark.parametrize("md5", ["0" * 32, "not an md5"])
    def test_another_md5(self, client: OpenAI, md5: str) -> None:
        upload = create(client)
        with pytest.raises(openai.BadRequestError) as refused:
            client.uploads.complete(upload.id, part_ids=[add(client, upload, ROWS)], md5=md5)
        assert refused.value.param == "md5"
        assert list(client.files.list()) == []

    def test_parts_that_are_unknown_foreign_or_given_twice(self, client: OpenAI) -> None:
        upload, other = create(client), create(client)
        own, foreign = add(client, upload, ROWS), add(client, other, ROWS)
        for part_ids in (["part_none"], [foreign], [own, own], ["../../jobs.db"]):
            with pytest.raises(openai.BadRequestError) as refused:
                client.uploads.complete(upload.id, part_ids=part_ids)
            assert refused.value.param == "part_ids"

    def test_rows_that_cannot_train_with_their_line(self, client: OpenAI, place: Place) -> None:
        bad = ROWS + b"hello\n"
        upload = create(client, len(bad))
        ids = [add(client, upload, data) for data in cut(bad, 3)]
        with pytest.raises(openai.BadRequestError) as refused:
            client.uploads.complete(upload.id, part_ids=ids)
        assert isinstance(refused.value.body, dict)
        assert (refused.value.code, refused.value.body["line"]) == ("invalid_training_file", 41)
        assert list(client.files.list()) == []
        client.uploads.cancel(upload.id)
        assert place.stored_files() == []

    def test_anything_after_the_end(self, client: OpenAI) -> None:
        completed, cancelled = create(client), create(client)
        ids = [add(client, completed, ROWS)]
        client.uploads.complete(completed.id, part_ids=ids)
        assert client.uploads.cancel(cancelled.id) == client.uploads.cancel(cancelled.id)
        for upload in (completed, cancelled):
            with pytest.raises(openai.ConflictError) as refused:
                client.uploads.parts.create(upload.id, data=ROWS)
            assert refused.value.code == "upload_not_pending"
        with pytest.raises(openai.ConflictError):
            client.uploads.cancel(completed.id)
        with pytest.raises(openai.ConflictError):
            client.uploads.complete(cancelled.id, part_ids=ids)
        with pytest.raises(openai.ConflictError):
            client.uploads.complete(completed.id, part_ids=["part_other"])

    def test_an_upload_that_is_not_there(self, client: OpenAI) -> None:
        calls = (
            lambda: client.uploads.cancel("upload_none"),
            lambda: client.uploads.complete("upload_none", part_ids=["a"]),
            lambda: client.uploads.parts.create("upload_none", data=b"a"),
        )
        for call in calls:
            with pytest.raises(openai.NotFoundError):
                call()

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"bytes": 0}, "bytes"),
            ({"bytes": "7"}, "bytes"),
            ({"filename": ""}, "filename"),
            ({"filename": "a\x07"}, "filename"),
            ({"mime_type": "application/pdf"}, "mime_type"),
            ({"purpose": "assistants"}, "purpose"),
            ({"expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after.seconds"),
            ({"expires_after": {"anchor": "last_active_at", "seconds": 3600}}, "expires_after.anchor"),
            ({"md5": "x"}, "md5"),
        ],
    )
    def test_a_wrong_upload_with_its_field(self, quiet_client: OpenAI, changes: dict[str, Any], param: str) -> None:
        body = {"bytes": 5, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"} | changes
        response = quiet_client._client.post(f"{quiet_client.base_url}uploads", content=json.dumps(body).encode())
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param


class TestBounds:
    @pytest.fixture
    def small(self, tmp_path: Path) -> Iterator[Place]:
        opened = open_place(tmp_path / "small", max_part_bytes=1000, max_upload_bytes=5000)
        yield opened
        opened.database.close()

    def test_part_and_upload_have_their_limits(self, small: Place) -> None:
        with serve(small) as url, client_of(url) as client:
            with pytest.raises(openai.APIStatusError) as refused:
                create(client, 5001)
            assert (refused.value.status_code, refused.value.param) == (413, "bytes")
            upload = create(client, 5000)
            add(client, upload, b"a" * 1000)
            with pytest.raises(openai.APIStatusError) as refused:
                client.uploads.parts.create(upload.id, data=b"a" * 1001)
            assert (refused.value.status_code, refused.value.param) == (413, "data")
            assert len(small.stored_files()) == 1

    def test_parts_beyond_what_the_file_can_need_are_refused(self, small: Place) -> None:
        with serve(small) as url, client_of(url) as client:
            upload = create(client, 100)
            for _ in range(9):  # the file and eight repetitions
                add(client, upload, b"a" * 100)
            with pytest.raises(openai.BadRequestError) as refused:
                client.uploads.parts.create(upload.id, data=b"a")
            assert refused.value.code == "too_many_parts"
            assert len(small.stored_files()) == 9

    def test_a_tenant_has_a_bounded_number_of_pending_uploads(self, client: OpenAI) -> None:
        uploads = [create(client) for _ in range(MAX_PENDING)]
        with pytest.raises(openai.RateLimitError):
            create(client)
        client.uploads.cancel(uploads[0].id)
        create(client)

    def test_what_a_tenants_pending_uploads_may_take_together_is_bounded(self, small: Place) -> None:
        with serve(small) as url, client_of(url) as client:
            uploads = [create(client, 5000) for _ in range(4)]
            with pytest.raises(openai.RateLimitError) as refused:
                create(client, 1)
            assert refused.value.code == "too_many_uploads"
            client.uploads.cancel(uploads[0].id)
            create(client, 5000)

    def test_an_empty_part_is_refused(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError):
            client.uploads.parts.create(create(client).id, data=b"")


class TestNothingIsLeftBehind:
    def test_by_a_part_that_was_cut_off(self, client: OpenAI, url: str, place: Place) -> None:
        upload = create(client)
        address = urlsplit(url)
        head = (
            f"POST /v1/uploads/{upload.id}/parts HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n"
            "Content-Type: multipart/form-data; boundary=xx\r\n\r\n"
            '--xx\r\nContent-Disposition: form-data; name="data"; filename="a"\r\n\r\n'
        )
        with socket.create_connection((str(address.hostname), address.port or 80), timeout=10) as connection:
            connection.sendall(head.encode() + ROWS)
            wait_until(place.stored_files, seconds=5)
        wait_until(lambda: place.stored_files() == [], seconds=5)
        part = add(client, upload, ROWS)
        assert client.uploads.complete(upload.id, part_ids=[part]).status == "completed"

    def test_by_a_part_that_came_while_its_upload_was_cancelled(self, place: Place) -> None:
        uploads = place.api.uploads.seen_by(TENANT)
        upload = uploads.create(filename="a", purpose="fine-tune", mime_type="text/jsonl", size_bytes=5)
        with uploads.begin_part(upload.id) as part:
            part.write(b"12345")
            uploads.cancel(upload.id)
            with pytest.raises(StorageError):
                uploads.finish_part(upload.id, part)
        with pytest.raises(ConflictError):
            uploads.begin_part(upload.id)
        assert place.stored_files() == []
        assert place.api.files.storage.uploads_with_parts() == set()

    def test_by_an_upload_that_expired(self, client: OpenAI, place: Place) -> None:
        old = UploadStore(
            place.database, max_part_bytes=10**6, tenant=TENANT, clock=lambda: time.time() - LIFE_SECONDS - 1
        ).create(filename="a", purpose="fine-tune", size_bytes=5, file_expires_after_seconds=None)
        with place.api.files.storage.receive_part(old.id) as part:
            part.write(b"12345")
            part.keep("part_old")
        with pytest.raises(openai.ConflictError, match="expired"):
            client.uploads.parts.create(old.id, data=b"1")
        assert place.stored_files() == ["part_old"]
        place.api.uploads.remove_expired()
        assert place.stored_files() == []
        assert not place.api.files.storage.part_path(old.id, "part_old").parent.exists()

    def test_by_a_server_that_was_killed(self, client: OpenAI, place: Place) -> None:
        upload = create(client)
        kept = add(client, upload, ROWS)
        storage = place.api.files.storage
        with storage.receive_part("upload_of_nobody") as part:
            part.write(b"1")
            part.keep("part_of_nobody")
        old = time.time() - 7200
        stray = storage.path("x").parent / "incoming" / "part-of-a-dead-server"
        stray.write_text("x")
        os.utime(stray, (old, old))
        place.api.sweep()
        assert place.stored_files() == [kept]


def test_a_repeated_creation_makes_nothing_twice(client: OpenAI, place: Place) -> None:
    def key(name: str) -> dict[str, Any]:
        return {"extra_headers": {"Idempotency-Key": name}}

    first, again = create(client, **key("a")), create(client, **key("a"))
    assert first == again
    with pytest.raises(openai.ConflictError):
        create(client, 7, **key("a"))
    parts = {client.uploads.parts.create(first.id, data=ROWS, **key("b")).id for _ in range(3)}
    assert len(parts) == 1
    assert len(place.stored_files()) == 1
    with pytest.raises(openai.ConflictError):
        client.uploads.parts.create(first.id, data=b"other", **key("b"))
    client.uploads.complete(first.id, part_ids=[*parts])
    files = {client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune", **key("c")).id for _ in range(3)}
    assert len(files) == 1
    assert len(list(client.files.list())) == 2
    with pytest.raises(openai.ConflictError):
        client.files.create(file=("other.jsonl", ROWS), purpose="fine-tune", **key("c"))
    with pytest.raises(openai.ConflictError, match="another request"):
        create(client, **key("c"))


def test_another_tenants_upload_is_not_there(place: Place) -> None:
    own = place.api.uploads.seen_by(TENANT)
    other = place.api.uploads.seen_by("other")
    upload = own.create(filename="a", purpose="fine-tune", mime_type="text/jsonl", size_bytes=5)
    for call in (lambda: other.cancel(upload.id), lambda: other.begin_part(upload.id)):
        with pytest.raises(LookupError, match="there is no upload"):
            call()
