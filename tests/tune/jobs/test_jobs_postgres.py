"""Real worker processes on either database."""

from __future__ import annotations

from contextlib import ExitStack

import httpx
import pytest

from registry.errors import InvalidRequestError
from tests.tune.jobs import standins
from tests.tune.jobs.support import BASE, Place, chat_rows, serve, wait_until
from tests.tune.jobs.test_jobs_worker import worker
from tune.jobs.database import Database


def test_three_workers_train_each_of_twelve_jobs_exactly_once(any_place: Place) -> None:
    place = any_place
    training_file = place.upload(chat_rows(20)).id
    ids = [place.queue_job(training_file).id for _ in range(12)]
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(worker(place, standins.trains_well, lease_seconds=30.0))
        wait_until(lambda: all(place.store.job(job_id).status == "succeeded" for job_id in ids), seconds=60)
    assert sorted(standins.attempts(place.directory)) == sorted(ids)
    assert len(place.registry.artifacts()) == 12
    assert {place.store.job(job_id).attempts for job_id in ids} == {1}


def test_a_nul_in_an_id_a_cursor_or_a_filter_is_a_wrong_request_on_either_database(any_place: Place) -> None:
    asked = {
        "/fine_tuning/jobs/ftjob-%00": 404,
        "/fine_tuning/jobs/ftjob-%00/events": 404,
        "/fine_tuning/jobs?after=%00": 400,
        "/fine_tuning/jobs?metadata[k]=%00": 200,
        "/files/file-%00": 404,
        "/files?after=%00": 400,
        "/files?purpose=%00": 200,
        "/webhook_endpoints/%00": 404,
    }
    with serve(any_place) as url, httpx.Client(trust_env=False, base_url=f"{url}/v1") as client:
        answers = {path: client.get(path) for path in asked}
        made = client.post("/fine_tuning/jobs", json={"model": BASE, "training_file": "file-\0"})
    assert made.status_code == 400
    is_postgres = any_place.database_url.startswith("postgresql")
    for path, status in asked.items():
        assert answers[path].status_code == (400 if is_postgres else status), answers[path].text
        if is_postgres:
            assert "NUL" in answers[path].json()["error"]["message"]


@pytest.mark.parametrize("url", ["postgresql+nodriver://host/capo", "oracle9://host/capo"])
def test_a_database_without_its_driver_is_refused_with_what_to_install(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="capo-llm\\[postgres\\]"):
        Database(url)
