"""Repeated requests with an ``Idempotency-Key``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from openai import OpenAI

from tests.tune.jobs.support import BASE, Place, add_file_row, chat_rows, new_job
from tune.jobs.idempotency import KEPT_SECONDS, Idempotency
from tune.jobs.store import JobStore


def create(client: OpenAI, file_id: str, key: str, seed: int = 1) -> str:
    made = client.fine_tuning.jobs.create(
        model=BASE, training_file=file_id, seed=seed, extra_headers={"Idempotency-Key": key}
    )
    return made.id


def test_the_same_request_gets_the_same_job_and_another_key_another(client: OpenAI, place: Place) -> None:
    file_id = add_file_row(place.file_rows)
    first = create(client, file_id, "a")
    assert create(client, file_id, "a") == first
    assert create(client, file_id, "b") != first
    assert len(place.store.jobs(after=None, limit=10).records) == 2


def test_a_key_with_another_body_is_refused(client: OpenAI, place: Place) -> None:
    file_id = add_file_row(place.file_rows)
    create(client, file_id, "a")
    with pytest.raises(openai.ConflictError) as refused:
        create(client, file_id, "a", seed=2)
    assert refused.value.code == "idempotency_key_reused"


def test_a_key_that_is_too_long_is_refused(client: OpenAI, place: Place) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, add_file_row(place.file_rows), "k" * 256)
    assert refused.value.code == "invalid_idempotency_key"


def test_requests_at_the_same_moment_make_one_job(any_place: Place) -> None:
    place = any_place
    new = new_job(add_file_row(place.file_rows))
    asked = Idempotency.of("a", b"{}")
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: place.store.create_job(new, asked=asked).id, range(24)))
    assert len(set(jobs)) == 1
    assert len(place.store.jobs(after=None, limit=10).records) == 1


def test_a_file_that_was_deleted_is_made_anew_under_its_key(client: OpenAI) -> None:
    def upload(rows: int) -> str:
        sent = ("rows.jsonl", chat_rows(rows))
        return client.files.create(file=sent, purpose="fine-tune", extra_headers={"Idempotency-Key": "a"}).id

    first = upload(10)
    assert upload(10) == first
    client.files.delete(first)
    second = upload(10)
    assert second != first
    assert upload(10) == second, "which the key means from now on"
    assert [file.id for file in client.files.list()] == [second]
    with pytest.raises(openai.ConflictError):
        upload(11)


def test_a_deleted_file_is_made_anew_once_by_requests_at_the_same_moment(any_place: Place) -> None:
    place = any_place
    asked = Idempotency.of("a", b"{}", making="file")
    old = replace(place.file_rows.get(add_file_row(place.file_rows)), id="file-old")
    place.file_rows.add(old, asked)
    place.file_rows.delete(old.id)
    new = [replace(old, id=f"file-{number}") for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        made = {record.id for record in pool.map(lambda record: place.file_rows.add(record, asked), new)}
    assert len(made) == 1
    assert made < {record.id for record in new}


def test_a_key_is_new_again_after_a_day(place: Place) -> None:
    new = new_job(add_file_row(place.file_rows))
    asked = Idempotency.of("a", b"{}")
    first = place.store.create_job(new, asked=asked)
    tomorrow = JobStore(place.database, tenant=place.store.tenant, clock=lambda: first.created_at + KEPT_SECONDS + 1.0)
    assert tomorrow.made_by(asked) is None
    assert tomorrow.create_job(new, asked=asked).id != first.id
