"""Fine-tuning jobs with the Python client, sync and async, against a real server and a real job store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from capo.client import (
    AsyncCapoClient,
    CapoClient,
    ConflictError,
    Hyperparameters,
    InvalidRequestError,
    JobMethod,
    JobOptions,
    JobStatus,
    NotFoundError,
    UnavailableError,
)
from registry.principal import Principal
from serve.access import OneTenant
from serve.grpc import GrpcServer
from serve.grpc.service_entry import ServiceEntry
from tests.tune.jobs.support import BASE, TENANT, Place, chat_rows, open_place
from tune.grpc import SERVICE_NAME, TuningServicer
from tune.jobs.queue import Outcome, WorkQueue
from tune.jobs.records import NewEvent
from tune.jobs.threads import JobThreads

Result = TypeVar("Result")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    opened = open_place(tmp_path)
    yield opened
    opened.database.close()


@contextlib.asynccontextmanager
async def serving(place: Place, port: int = 0) -> AsyncIterator[int]:
    entry = ServiceEntry(SERVICE_NAME, TuningServicer(place.jobs, JobThreads().store).add_to)
    server = GrpcServer(None, access=OneTenant(Principal.local(TENANT)), others=[entry])
    try:
        yield await server.start("127.0.0.1", port)
    finally:
        await server.stop()


async def in_thread(work: Callable[[CapoClient], Result], port: int, **options: Any) -> Result:
    def run() -> Result:
        with CapoClient(f"127.0.0.1:{port}", **options) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def test_both_clients_make_and_show_the_same_job(place: Place) -> None:
    training = place.upload(chat_rows(20)).id
    options = JobOptions(
        suffix="sums",
        seed=5,
        method=JobMethod.SUPERVISED,
        hyperparameters=Hyperparameters(n_epochs=2),
        metadata={"team": "red"},
        capo={"lora": {"rank": 4}, "priority": -2},
        idempotency_key="one",
    )
    async with serving(place) as port:
        made = await in_thread(lambda client: client.create_job(BASE, training, options=options), port)
        async with AsyncCapoClient(f"127.0.0.1:{port}") as client:
            assert await client.create_job(BASE, training, options=options) == made
            assert await client.job(made.id) == made
            assert (await client.jobs(limit=5)).jobs == (made,)
            assert (await client.jobs(metadata={"team": "blue"})).jobs == ()
            assert (await client.pause_job(made.id)).paused
            assert not (await client.resume_job(made.id)).paused
            assert (await client.cancel_job(made.id)).status is JobStatus.CANCELLED
            with pytest.raises(ConflictError):
                await client.pause_job(made.id)
        assert (await in_thread(lambda client: client.job(made.id), port)).status.has_ended
        assert not (await in_thread(lambda client: client.jobs(), port)).has_more
    assert made.hyperparameters.n_epochs == 2
    assert made.hyperparameters.beta is None
    assert (made.status, made.suffix, made.seed, made.priority) == (JobStatus.QUEUED, "sums", 5, -2)
    assert (made.capo, made.metadata) == ({"lora": {"rank": 4}, "priority": -2}, {"team": "red"})
    assert (made.fine_tuned_model, made.error, made.finished_at) == (None, None, None)


async def test_refusals_carry_code_and_field(place: Place) -> None:
    async with serving(place) as port:

        def wrong(client: CapoClient) -> None:
            with pytest.raises(InvalidRequestError) as refused:
                client.create_job(BASE, "file-nothing")
            assert (refused.value.code, refused.value.param) == ("file_not_found", "training_file")
            with pytest.raises(NotFoundError):
                client.job("ftjob-nothing")
            with pytest.raises(NotFoundError):
                next(client.follow_job("ftjob-nothing"))

        await in_thread(wrong, port)


async def test_following_survives_a_server_that_starts_again_without_a_gap_or_a_repetition(place: Place) -> None:
    queue = WorkQueue(place.database)
    job = queue.claim(place.queue_job(place.upload(chat_rows(20)).id), owner="me", lease_seconds=30)
    assert job is not None
    seen: dict[str, list[int]] = {"sync": [], "async": []}
    is_amid = asyncio.Event()

    def follow(client: CapoClient) -> None:
        seen["sync"].extend(event.sequence for event in client.follow_job(job.id))

    async def follow_too(port: int) -> None:
        async with AsyncCapoClient(f"127.0.0.1:{port}") as client:
            async for event in client.follow_job(job.id):
                seen["async"].append(event.sequence)
                if len(seen["async"]) == 100:
                    is_amid.set()

    async with serving(place) as port:
        followers = [asyncio.create_task(in_thread(follow, port)), asyncio.create_task(follow_too(port))]
        await asyncio.to_thread(queue.add_events, job, [NewEvent(str(number)) for number in range(300)])
        async with asyncio.timeout(30):
            await is_amid.wait()
    await asyncio.to_thread(queue.add_events, job, [NewEvent("while nobody served")])
    async with serving(place, port):
        await asyncio.to_thread(queue.succeed, job, Outcome("m@0", 1, None))
        async with asyncio.timeout(30):
            await asyncio.gather(*followers)
    expected = [event.sequence for event in place.store.events_since(job.id, 0)]
    assert len(expected) > 300
    assert seen == {"sync": expected, "async": expected}


async def test_without_retries_a_broken_stream_is_the_callers_to_take_up(place: Place) -> None:
    job_id = place.queue_job(place.upload(chat_rows(20)).id).id
    async with serving(place) as port, AsyncCapoClient(f"127.0.0.1:{port}", retries=0) as client:
        (event, *_) = place.store.events_since(job_id, 0)
        events = client.follow_job(job_id)
        assert (await anext(events)).id == event.id
        place.store.cancel(job_id)
        rest = [event.message async for event in client.follow_job(job_id, after_event_id=event.id)]
        assert rest == ["Fine-tuning job cancelled"]
        await events.aclose()
    async with AsyncCapoClient(f"127.0.0.1:{port}", retries=0) as client:
        with pytest.raises(UnavailableError):
            await anext(client.follow_job(job_id))
