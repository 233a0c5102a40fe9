"""Which job comes next: by priority, then for the tenant with the fewest running jobs, then by age; and for whom."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from registry.errors import InvalidRequestError
from tests.tune.jobs.support import BASE, TENANT, Place, add_file_row, chat_rows, new_job
from tune.jobs.api import TuningApi
from tune.jobs.queue import WorkQueue
from tune.jobs.records import JobRecord
from tune.jobs.requests import CreateJobBody
from tune.jobs.store import JobStore


@pytest.fixture
def place(any_place: Place) -> Place:
    return any_place


def queued(place: Place, tenant: str, **changes: object) -> JobRecord:
    file_id = add_file_row(place.file_rows, tenant=tenant)
    return JobStore(place.database, tenant=tenant).create_job(new_job(file_id, **changes))


def claim_all(queue: WorkQueue) -> list[str]:
    """Claim until nothing may start; the ids in order. Every claimed job stays running."""
    claimed = []
    while (seen := queue.next_waiting()) is not None:
        job = queue.claim(seen, owner="me", lease_seconds=30)
        assert job is not None
        claimed.append(job.id)
    return claimed


def test_a_tenant_with_many_jobs_does_not_hold_up_one_with_few(place: Place) -> None:
    many = [queued(place, "acme").id for _ in range(5)]
    few = [queued(place, "birch").id for _ in range(2)]
    assert claim_all(WorkQueue(place.database)) == [many[0], few[0], many[1], few[1], *many[2:]]


def test_priority_comes_before_fairness_and_fairness_before_age(place: Place) -> None:
    old, urgent = queued(place, "acme").id, queued(place, "acme", priority=5).id
    other = queued(place, "birch").id
    assert claim_all(WorkQueue(place.database)) == [urgent, other, old]


def test_a_job_that_has_ended_counts_no_more(place: Place) -> None:
    queue = WorkQueue(place.database)
    first, second = queued(place, "acme"), queued(place, "acme")
    third = queued(place, "birch")
    claimed = queue.claim(first, owner="me", lease_seconds=30)
    assert claimed is not None
    queue.end_cancelled(claimed)
    assert claim_all(queue) == [second.id, third.id]


def test_no_tenant_has_more_running_jobs_than_the_bound(place: Place) -> None:
    queue = WorkQueue(place.database, max_running_per_tenant=2)
    acme = [queued(place, "acme") for _ in range(4)]
    birch = queued(place, "birch")
    assert claim_all(queue) == [acme[0].id, birch.id, acme[1].id]
    assert queue.claim(acme[2], owner="me", lease_seconds=30) is None, "not even for one who saw it before"
    running = place.store.job(acme[0].id)
    queue.end_cancelled(running)
    assert claim_all(queue) == [acme[2].id]


def test_racing_claims_keep_the_bound(place: Place) -> None:
    jobs = [queued(place, "acme") for _ in range(12)]
    barrier = threading.Barrier(4)
    won: list[str] = []

    def race(mine: list[JobRecord]) -> None:
        queue = WorkQueue(place.database, max_running_per_tenant=3)
        barrier.wait()
        for job in mine:
            if queue.claim(job, owner=f"worker-{job.id}", lease_seconds=30) is not None:
                won.append(job.id)

    threads = [threading.Thread(target=race, args=(jobs[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == len(set(won)) == 3
    assert Counter(place.store.job(job.id).status for job in jobs) == {"running": 3, "queued": 9}


def test_a_lost_job_is_taken_over_even_where_its_tenant_is_at_the_bound(place: Place) -> None:
    queue = WorkQueue(place.database, max_running_per_tenant=1)
    job = queued(place, "acme")
    lost = queue.claim(job, owner="gone", lease_seconds=30)
    assert lost is not None
    taken = queue.claim(lost, owner="me", lease_seconds=30)
    assert taken is not None
    assert taken.epoch == lost.epoch + 1
    last = place.store.events_since(job.id, 0)[-1]
    assert (last.level, last.data) == ("warn", {"reason": "worker_lost"})


def test_a_worker_takes_only_what_fits_its_gpus(place: Place) -> None:
    large, small, none = (queued(place, "acme", gpus=gpus) for gpus in (4, 1, 0))
    assert claim_all(WorkQueue(place.database)) == [none.id]
    one = WorkQueue(place.database, gpus=1)
    assert one.claim(large, owner="me", lease_seconds=30) is None
    assert claim_all(one) == [small.id]
    assert claim_all(WorkQueue(place.database, gpus=8)) == [large.id]


def test_jobs_whose_workers_are_on_their_way_count_as_running(place: Place) -> None:
    queue = WorkQueue(place.database, max_running_per_tenant=2)
    acme = [queued(place, "acme") for _ in range(3)]
    birch = queued(place, "birch")
    launched: set[str] = set()
    order = []
    while (job := queue.next_waiting(launched=launched)) is not None:
        launched.add(job.id)
        order.append(job.id)
    assert order == [acme[0].id, birch.id, acme[1].id]
    assert queue.next_waiting(launched=set(), held_back={acme[0].id, birch.id}) == acme[1]


def test_a_job_that_no_worker_here_could_ever_take_is_refused_when_it_is_made(place: Place) -> None:
    api = TuningApi(place.database, place.files.storage, place.registry, base_models={BASE: BASE}, max_gpus=2)
    body = {"model": BASE, "training_file": place.upload(chat_rows(20)).id, "capo": {"gpus": 3}}
    jobs = api.jobs.seen_by(TENANT)
    with pytest.raises(InvalidRequestError, match=r"capo\.gpus=3 is above 2") as refused:
        jobs.create(CreateJobBody.model_validate(body))
    assert refused.value.param == "capo.gpus"
    assert jobs.create(CreateJobBody.model_validate(body | {"capo": {"gpus": 2}})).gpus == 2
