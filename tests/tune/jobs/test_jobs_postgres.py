"""Real worker processes on either database."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from registry.errors import InvalidRequestError
from tests.tune.jobs import standins
from tests.tune.jobs.support import Place, chat_rows, wait_until
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


@pytest.mark.parametrize("url", ["postgresql+nodriver://host/capo", "oracle9://host/capo"])
def test_a_database_without_its_driver_is_refused_with_what_to_install(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="capo-llm\\[postgres\\]"):
        Database(url)
