"""Every method of the stock SDK's ``files``, ``uploads``, ``fine_tuning`` and ``models``, in both of its clients.

One conversation is held twice, and in the end it is counted which methods the SDK has and which were called.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from serve.catalog import Catalog
from serve.routes.models import models_router
from tests.tune.jobs import standins
from tests.tune.jobs.published import publish_job
from tests.tune.jobs.sdk_types import assert_no_wrong_typed_field
from tests.tune.jobs.support import BASE, Place, chat_rows, client_of, serve
from tests.tune.jobs.test_jobs_worker import wait_for, worker

RESOURCES = (
    "files",
    "uploads",
    "uploads.parts",
    "fine_tuning.jobs",
    "fine_tuning.jobs.checkpoints",
    "fine_tuning.checkpoints.permissions",
    "models",
)
ROWS = chat_rows(60)


@pytest.fixture
def whole_url(place: Place) -> Iterator[str]:
    """With the models beside the jobs, as the composed service has them."""
    with serve(place, models_router(Catalog(place.registry, BASE))) as address:
        yield address


def methods_of(client: Any) -> set[str]:
    found = set()
    for path in RESOURCES:
        kind = type(resolve(client, path))
        found |= {f"{path}.{name}" for name, _ in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"}
    return found


def resolve(client: Any, path: str) -> Any:
    for part in path.split("."):
        client = getattr(client, part)
    return client


class Conversation:
    """Calls methods by name, in either client; every object that comes back is held against the SDK's types."""

    def __init__(self, client: OpenAI | AsyncOpenAI) -> None:
        self.client = client
        self.called: set[str] = set()

    async def call(self, method: str, *given: Any, **named: Any) -> Any:
        self.called.add(method)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the SDK's own, of methods that it keeps
            answer = resolve(self.client, method)(*given, **named)
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, BaseModel) and not hasattr(answer, "iter_pages"):
            assert_no_wrong_typed_field(answer)
        return answer

    async def all(self, method: str, *given: Any, **named: Any) -> list[Any]:
        """Every item of every page, by the SDK's pager; the first page is held against its type too."""
        self.called.add(method)
        pages = resolve(self.client, method)(*given, **named)
        first = await pages if inspect.isawaitable(pages) else pages
        assert_no_wrong_typed_field(first)
        assert first.object == "list"
        found = [item async for item in pages] if hasattr(pages, "__aiter__") else list(pages)
        for item in found:
            assert_no_wrong_typed_field(item)
        return found


@asynccontextmanager
async def either(kind: str, url: str) -> AsyncIterator[Conversation]:
    if kind == "sync":
        with client_of(url) as client:
            yield Conversation(client)
        return
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="unused", max_retries=0, http_client=httpx.AsyncClient(trust_env=False)
    ) as client:
        yield Conversation(client)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_every_method_works_and_answers_with_its_own_type(
    whole_url: str, place: Place, tmp_path: Path, kind: str
) -> None:
    async with either(kind, whole_url) as talk:
        await about_files(talk)
        training = await about_uploads(talk, tmp_path)
        job_id = await about_jobs(talk, training)
        job = place.store.job(job_id)
        publish_job(place, job, steps=12, checkpoints=(4, 8))
        await about_checkpoints(talk, job_id, job.reserved_name)
        await about_models(talk, job.reserved_name)
        assert talk.called == methods_of(talk.client)


async def about_files(talk: Conversation) -> None:
    file = await talk.call("files.create", file=("rows.jsonl", ROWS), purpose="fine-tune")
    assert await talk.call("files.retrieve", file.id) == file
    assert await talk.call("files.wait_for_processing", file.id) == file
    content = await talk.call("files.content", file.id)
    assert content.content == ROWS
    assert await talk.call("files.retrieve_content", file.id) == ROWS.decode()
    assert [found.id for found in await talk.all("files.list", purpose="fine-tune", limit=1)] == [file.id]
    assert (await talk.call("files.delete", file.id)).deleted


async def about_uploads(talk: Conversation, directory: Path) -> str:
    path = directory / "rows.jsonl"
    path.write_bytes(ROWS)
    named: dict[str, Any] = {"mime_type": "text/jsonl", "purpose": "fine-tune"}
    upload = await talk.call("uploads.create", bytes=len(ROWS), filename="a", **named)
    part = await talk.call("uploads.parts.create", upload.id, data=ROWS)
    completed = await talk.call("uploads.complete", upload.id, part_ids=[part.id])
    assert (completed.status, completed.file.bytes) == ("completed", len(ROWS))
    upload = await talk.call("uploads.create", bytes=1, filename="a", **named)
    assert (await talk.call("uploads.cancel", upload.id)).status == "cancelled"
    chunked = await talk.call("uploads.upload_file_chunked", file=path, part_size=3000, **named)
    return str(chunked.file.id)


async def about_jobs(talk: Conversation, training_file: str) -> str:
    asked: dict[str, Any] = {"model": BASE, "training_file": training_file, "metadata": {"run": "1"}}
    job = await talk.call("fine_tuning.jobs.create", suffix="care", **asked)
    assert (await talk.call("fine_tuning.jobs.pause", job.id)).to_dict()["capo"]["paused"]
    assert (await talk.call("fine_tuning.jobs.resume", job.id)).status == "queued"
    other = await talk.call("fine_tuning.jobs.create", **asked)
    assert (await talk.call("fine_tuning.jobs.cancel", other.id)).status == "cancelled"
    assert (await talk.call("fine_tuning.jobs.retrieve", job.id)).id == job.id
    listed = await talk.all("fine_tuning.jobs.list", limit=1, metadata={"run": "1"})
    assert [found.id for found in listed] == [other.id, job.id]
    events = await talk.all("fine_tuning.jobs.list_events", job.id, limit=2)
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    return str(job.id)


async def about_checkpoints(talk: Conversation, job_id: str, name: str) -> None:
    found = await talk.all("fine_tuning.jobs.checkpoints.list", job_id, limit=2)
    assert [checkpoint.step_number for checkpoint in found] == [12, 8, 4], "newest first, over two pages"
    assert found[0].fine_tuned_model_checkpoint == name
    assert found[2].fine_tuned_model_checkpoint == f"{name}:ckpt-step-4"
    assert {checkpoint.fine_tuning_job_id for checkpoint in found} == {job_id}
    assert found[0].metrics.to_dict() == {
        "step": 12.0, "train_loss": 0.125, "full_valid_loss": 0.5, "valid_loss": 0.5
    }  # fmt: skip
    assert found[2].metrics.train_mean_token_accuracy == 0.25
    permissions = "fine_tuning.checkpoints.permissions"
    model = found[1].fine_tuned_model_checkpoint
    made = await talk.all(f"{permissions}.create", model, project_ids=["red", "blue"])
    assert [permission.project_id for permission in made] == ["red", "blue"]
    listed = await talk.all(f"{permissions}.list", model, limit=1, order="ascending")
    assert [permission.id for permission in listed] == [permission.id for permission in made]
    page = await talk.call(f"{permissions}.retrieve", model, project_id="blue")
    assert [permission.id for permission in page.data] == [made[1].id]
    gone = await talk.call(f"{permissions}.delete", made[0].id, fine_tuned_model_checkpoint=model)
    assert gone.deleted
    assert [permission.project_id for permission in await talk.all(f"{permissions}.list", model)] == ["blue"]


async def about_models(talk: Conversation, name: str) -> None:
    model = await talk.call("models.retrieve", f"{name}:ckpt-step-4")
    assert model.id == f"{name}:ckpt-step-4"
    ids = {found.id for found in await talk.all("models.list")}
    assert ids == {BASE, name, f"{name}:ckpt-step-4", f"{name}:ckpt-step-8"}
    assert (await talk.call("models.delete", f"{name}:ckpt-step-8")).deleted
    assert {found.id for found in await talk.all("models.list")} == ids - {f"{name}:ckpt-step-8"}


class TestCheckpoints:
    def test_those_that_were_deleted_are_not_listed(self, whole_url: str, place: Place) -> None:
        job = place.queue_job(place.upload(ROWS).id)
        publish_job(place, job, steps=12, checkpoints=(4, 8))
        with client_of(whole_url) as client:
            client.models.delete(f"{job.reserved_name}:ckpt-step-8")
            client.models.delete(job.reserved_name)
            (left,) = client.fine_tuning.jobs.checkpoints.list(job.id)
            assert left.step_number == 4
            assert list(client.fine_tuning.jobs.checkpoints.list(job.id, after=left.id)) == []

    def test_a_job_without_any_has_an_empty_list(self, client: OpenAI, place: Place) -> None:
        job = place.queue_job(place.upload(ROWS).id)
        page = client.fine_tuning.jobs.checkpoints.list(job.id)
        assert (page.data, page.has_more) == ([], False)


def test_events_are_followed_to_the_end_without_a_gap(client: OpenAI, place: Place) -> None:
    """As people do it with OpenAI: ask for the newest ones, and stop at the first that was seen before."""
    job = client.fine_tuning.jobs.create(model=BASE, training_file=place.upload(ROWS).id)
    seen: list[str] = []
    with worker(place, standins.trains_well):
        ended = False
        while not ended:
            ended = client.fine_tuning.jobs.retrieve(job.id).status not in ("queued", "running")
            new = []
            for event in client.fine_tuning.jobs.list_events(job.id, limit=3):
                if seen and event.id == seen[-1]:
                    break
                assert_no_wrong_typed_field(event)
                new.append(event.id)
            seen += reversed(new)
    assert seen == [event.id for event in place.store.events_since(job.id, 0)]
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert_no_wrong_typed_field(done)
    assert (done.status, done.estimated_finish) == ("succeeded", None)
    table = client.files.content(done.result_files[0]).text
    assert table.splitlines()[0].startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy")
    assert client.files.retrieve(done.result_files[0]).purpose == "fine-tune-results"


def test_a_running_job_says_when_it_will_be_done(client: OpenAI, place: Place) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=place.upload(ROWS).id)
    assert client.fine_tuning.jobs.retrieve(job.id).estimated_finish is None
    with worker(place, standins.takes_long):
        wait_for(place, job.id, "running")
        running = client.fine_tuning.jobs.retrieve(job.id)
        while running.estimated_finish is None:
            running = client.fine_tuning.jobs.retrieve(job.id)
        assert_no_wrong_typed_field(running)
        assert running.estimated_finish > running.created_at + 100_000, "a million steps, one second each"
        assert (running.trained_tokens, running.finished_at) == (None, None)
        client.fine_tuning.jobs.cancel(job.id)
        cancelled = wait_for(place, job.id, "cancelled")
    assert cancelled.estimated_finish is None
