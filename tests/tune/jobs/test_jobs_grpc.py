"""Fine-tuning jobs over gRPC: the same jobs, checks and errors as over HTTP, and a stream of events that can be taken
up again."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from capo_proto.v1 import tuning_pb2 as pb
from capo_proto.v1 import tuning_pb2_grpc as stubs
from registry.principal import Principal
from serve.access import OneTenant
from serve.grpc import GrpcServer
from serve.grpc.service_entry import ServiceEntry
from tests.tune.jobs.support import BASE, TENANT, Place, chat_rows, preference_rows, serve
from tune.grpc import SERVICE_NAME, TuningServicer
from tune.jobs.queue import Outcome, WorkQueue
from tune.jobs.records import JobError, NewEvent
from tune.jobs.threads import JobThreads


@contextlib.asynccontextmanager
async def channel_to(place: Place, *, tenant: str = TENANT) -> AsyncIterator[grpc.aio.Channel]:
    """A server as ``capo`` puts it together, without an engine."""
    entry = ServiceEntry(SERVICE_NAME, TuningServicer(place.jobs, JobThreads().store).add_to)
    server = GrpcServer(None, access=OneTenant(Principal.local(tenant)), others=[entry])
    port = await server.start("127.0.0.1", 0)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def tuning(place: Place, *, tenant: str = TENANT) -> AsyncIterator[Any]:
    async with channel_to(place, tenant=tenant) as channel:
        yield stubs.TuningStub(channel)


def over_http(url: str, verb: str, path: str, **options: Any) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.request(verb, f"{url}/v1/fine_tuning/jobs{path}", trust_env=False, **options).json()
    return answer


def claim(place: Place, job_id: str) -> Any:
    job = WorkQueue(place.database).claim(place.store.job(job_id), owner="me", lease_seconds=30)
    assert job is not None
    return job


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value


def trailers(error: grpc.aio.AioRpcError) -> dict[str, str]:
    return {key: str(value) for key, value in error.trailing_metadata()}


async def test_a_job_is_the_same_over_both_faces(place: Place) -> None:
    training, validation = place.upload(chat_rows(20)).id, place.upload(chat_rows(12, first=50)).id
    request = pb.CreateJobRequest(
        model=BASE,
        training_file=training,
        validation_file=validation,
        suffix="sums",
        seed=11,
        method=pb.JOB_METHOD_SUPERVISED,
        hyperparameters=pb.Hyperparameters(n_epochs=2, learning_rate_multiplier=0.7),
        metadata={"team": "red"},
        capo=json.dumps({"lora": {"rank": 4}, "priority": 3}),
    )
    with serve(place) as url:
        async with tuning(place) as stub:
            made = await stub.CreateJob(request)
            shown = await asyncio.to_thread(over_http, url, "GET", f"/{made.id}")
            assert await stub.GetJob(pb.GetJobRequest(job_id=made.id)) == made
        body = {
            "model": BASE,
            "training_file": training,
            "validation_file": validation,
            "suffix": "sums",
            "seed": 11,
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 0.7}},
            },
            "metadata": {"team": "red"},
            "capo": {"lora": {"rank": 4}, "priority": 3},
        }
        twin = await asyncio.to_thread(over_http, url, "POST", "", json=body)
    own = {"id", "created_at"}
    assert {key: value for key, value in shown.items() if key not in own} == {
        key: value for key, value in twin.items() if key not in own
    }
    numbers = made.hyperparameters
    assert {"n_epochs": numbers.n_epochs, "batch_size": numbers.batch_size} == {
        "n_epochs": shown["hyperparameters"]["n_epochs"],
        "batch_size": shown["hyperparameters"]["batch_size"],
    }
    assert numbers.learning_rate_multiplier == shown["hyperparameters"]["learning_rate_multiplier"] == 0.7
    assert not numbers.HasField("beta")
    assert (made.status, made.priority, made.seed, made.suffix) == (pb.JOB_STATUS_QUEUED, 3, 11, "sums")
    assert (made.training_file, made.validation_file) == (training, validation)
    assert json.loads(made.capo) == {"lora": {"rank": 4}, "priority": 3}
    assert dict(made.metadata) == shown["metadata"]
    assert made.organization_id == shown["organization_id"] == TENANT


async def test_a_dpo_job_shows_its_beta(place: Place) -> None:
    request = pb.CreateJobRequest(
        model=BASE, training_file=place.upload(preference_rows(12)).id, method=pb.JOB_METHOD_DPO
    )
    async with tuning(place) as stub:
        made = await stub.CreateJob(request)
    assert made.method == pb.JOB_METHOD_DPO
    assert made.hyperparameters.beta > 0


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unknown model": ({"model": "gpt-9"}, {"model": "gpt-9"}),
    "no such file": ({"training_file": "file-nothing"}, {"training_file": "file-nothing"}),
    "bad suffix": ({"suffix": "No Spaces!"}, {"suffix": "No Spaces!"}),
    "too many epochs": (
        {"hyperparameters": pb.Hyperparameters(n_epochs=51)},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 51}}}},
    ),
    "beta of a supervised job": (
        {"hyperparameters": pb.Hyperparameters(beta=0.1)},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}}},
    ),
    "unknown extension": ({"capo": '{"ranks": 4}'}, {"capo": {"ranks": 4}}),
    "extension of the wrong kind": ({"capo": "[1]"}, {"capo": [1]}),
    "wrong method for the file": ({"method": pb.JOB_METHOD_DPO}, {"method": {"type": "dpo", "dpo": {}}}),
    "more GPUs than any job may ask for": ({"capo": '{"gpus": 65}'}, {"capo": {"gpus": 65}}),
    "an integration without its key": (
        {"integrations": [pb.Integration(wandb=pb.WandbIntegration(project="sums", tags=["a"]))]},
        {"integrations": [{"type": "wandb", "wandb": {"project": "sums", "tags": ["a"]}}]},
    ),
    "long metadata": ({"metadata": {"k" * 65: "v"}}, {"metadata": {"k" * 65: "v"}}),
}


@pytest.mark.parametrize("fault", WRONG)
async def test_what_is_wrong_is_wrong_over_both_faces_in_the_same_words(place: Place, fault: str) -> None:
    good = {"model": BASE, "training_file": place.upload(chat_rows(20)).id}
    fields, body = WRONG[fault]
    with serve(place) as url:
        async with tuning(place) as stub:
            refused = await refusal(stub.CreateJob(pb.CreateJobRequest(**(good | fields))))
        error = (await asyncio.to_thread(over_http, url, "POST", "", json=good | body))["error"]
    assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.details() == error["message"]
    assert trailers(refused)["capo-error-code"] == error["code"]
    assert trailers(refused).get("capo-error-param") == error["param"]
    assert place.store.jobs(after=None, limit=5).records == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"capo": "{"}, "capo"),
        ({"capo": '{"validation_share": NaN}'}, "capo"),
        ({"method": 7}, "method"),
        ({"hyperparameters": pb.Hyperparameters(learning_rate_multiplier=float("inf"))}, "hyperparameters"),
        ({"integrations": [pb.Integration()]}, "integrations"),
    ],
)
async def test_what_only_protobuf_can_get_wrong_is_refused_by_name(
    place: Place, fields: dict[str, Any], param: str
) -> None:
    request = pb.CreateJobRequest(model=BASE, training_file=place.upload(chat_rows(20)).id, **fields)
    async with tuning(place) as stub:
        refused = await refusal(stub.CreateJob(request))
    assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert trailers(refused)["capo-error-param"].startswith(param)


async def test_unknown_fields_and_ids_are_treated_as_in_the_other_services(place: Place) -> None:
    unknown = pb.GetJobRequest.FromString(b"\x9a\x06\x01x")
    async with tuning(place) as stub:
        assert trailers(await refusal(stub.GetJob(unknown)))["capo-error-code"] == "unknown_field"
        call = stub.GetJob(pb.GetJobRequest(job_id="ftjob-nothing"), metadata=(("x-request-id", "mine-1"),))
        missing = await refusal(call)
        assert missing.code() == grpc.StatusCode.NOT_FOUND
        assert dict(missing.initial_metadata())["x-request-id"] == "mine-1"


async def test_the_service_is_in_reflection_with_its_comments_worth_of_methods(place: Place) -> None:
    async with channel_to(place) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([asked])):
            names = {service.name for service in answer.list_services_response.service}
    assert SERVICE_NAME == "capo.v1.Tuning"
    assert SERVICE_NAME in names


async def test_a_repeated_request_with_its_key_makes_one_job(place: Place) -> None:
    request = pb.CreateJobRequest(
        model=BASE, training_file=place.upload(chat_rows(20)).id, idempotency_key="once", metadata={"b": "2", "a": "1"}
    )
    async with tuning(place) as stub:
        first, second = await stub.CreateJob(request), await stub.CreateJob(request)
        assert first.id == second.id
        request.suffix = "other"
        assert (await refusal(stub.CreateJob(request))).code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_jobs_are_listed_in_pages_and_by_metadata(place: Place) -> None:
    training = place.upload(chat_rows(20)).id
    made = [place.queue_job(training, metadata={"n": str(number % 2)}).id for number in range(5)]
    async with tuning(place) as stub:
        listed: list[str] = []
        page = await stub.ListJobs(pb.ListJobsRequest(limit=2))
        listed += [job.id for job in page.jobs]
        while page.has_more:
            page = await stub.ListJobs(pb.ListJobsRequest(limit=2, after=listed[-1]))
            listed += [job.id for job in page.jobs]
        assert listed == made[::-1]
        odd = await stub.ListJobs(pb.ListJobsRequest(metadata={"n": "1"}))
        assert [job.id for job in odd.jobs] == [made[3], made[1]]
        for wrong in (pb.ListJobsRequest(limit=0), pb.ListJobsRequest(limit=101), pb.ListJobsRequest(after="x")):
            assert (await refusal(stub.ListJobs(wrong))).code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_job_is_paused_resumed_and_cancelled(place: Place) -> None:
    job_id = place.queue_job(place.upload(chat_rows(20)).id).id
    async with tuning(place) as stub:
        assert (await stub.PauseJob(pb.PauseJobRequest(job_id=job_id))).paused
        assert not (await stub.ResumeJob(pb.ResumeJobRequest(job_id=job_id))).paused
        cancelled = await stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        assert cancelled.status == pb.JOB_STATUS_CANCELLED
        late = await refusal(stub.PauseJob(pb.PauseJobRequest(job_id=job_id)))
        assert late.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert trailers(late)["capo-error-code"] == "job_already_ended"


async def test_another_tenants_job_is_not_there(place: Place) -> None:
    job_id = place.queue_job(place.upload(chat_rows(20)).id).id
    async with tuning(place, tenant="birch") as stub:
        assert not (await stub.ListJobs(pb.ListJobsRequest())).jobs
        calls = (
            stub.GetJob(pb.GetJobRequest(job_id=job_id)),
            stub.CancelJob(pb.CancelJobRequest(job_id=job_id)),
            stub.PauseJob(pb.PauseJobRequest(job_id=job_id)),
            stub.ResumeJob(pb.ResumeJobRequest(job_id=job_id)),
            stub.FollowJob(pb.FollowJobRequest(job_id=job_id)).read(),
        )
        for call in calls:
            assert (await refusal(call)).code() == grpc.StatusCode.NOT_FOUND
    assert place.store.job(job_id).status == "queued"


class TestFollowing:
    async def test_the_stream_tells_everything_in_order_and_ends_with_the_job(self, place: Place) -> None:
        job_id = place.queue_job(place.upload(chat_rows(20)).id).id
        queue = WorkQueue(place.database)

        def work() -> None:
            job = claim(place, job_id)
            for step in range(1, 451):  # more than one look takes at once
                queue.add_events(job, [NewEvent(f"step {step}", kind="metrics", data={"step": step})])
            queue.succeed(job, Outcome("m@0", 7, None))

        async with tuning(place) as stub:
            stream = aiter(stub.FollowJob(pb.FollowJobRequest(job_id=job_id)))
            first = await anext(stream)
            worker = asyncio.create_task(asyncio.to_thread(work))
            events = [first, *[event async for event in stream]]
            await worker
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert [event.id for event in events] == [event.id for event in place.store.events_since(job_id, 0, limit=2000)]
        assert events[-1].message == "The job has successfully completed"
        metrics = [event for event in events if event.kind == pb.JOB_EVENT_KIND_METRICS]
        assert [json.loads(event.data)["step"] for event in metrics] == list(range(1, 451))

    async def test_a_stream_is_taken_up_again_after_an_event(self, place: Place) -> None:
        job_id = place.queue_job(place.upload(chat_rows(20)).id).id
        job = claim(place, job_id)
        queue = WorkQueue(place.database)
        queue.add_events(job, [NewEvent(str(number)) for number in range(6)])
        async with tuning(place) as stub:
            stream = stub.FollowJob(pb.FollowJobRequest(job_id=job_id))
            seen = [await stream.read() for _ in range(4)]
            stream.cancel()
            queue.fail(job, JobError("x", "it broke"))
            rest = stub.FollowJob(pb.FollowJobRequest(job_id=job_id, after_event_id=seen[-1].id))
            events = [*seen, *[event async for event in rest]]
            last = stub.FollowJob(pb.FollowJobRequest(job_id=job_id, after_event_id=events[-1].id))
            assert [event async for event in last] == []
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert (events[-1].level, events[-1].message) == (pb.JOB_EVENT_LEVEL_ERROR, "it broke")

    async def test_an_event_of_another_job_is_no_place_to_go_on_from(self, place: Place) -> None:
        training = place.upload(chat_rows(20)).id
        mine, other = place.queue_job(training).id, place.queue_job(training).id
        (event, *_) = place.store.events_since(other, 0)
        async with tuning(place) as stub:
            request = pb.FollowJobRequest(job_id=mine, after_event_id=event.id)
            assert (await refusal(stub.FollowJob(request).read())).code() == grpc.StatusCode.INVALID_ARGUMENT
