"""Every call of the stock OpenAI SDK against a real server, and what it answers to wrong requests."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.tune.jobs.sdk_types import assert_no_wrong_typed_field
from tests.tune.jobs.support import BASE, Place, add_file_row, chat_rows, new_job, preference_rows
from tune.jobs.queue import Outcome, WorkQueue
from tune.jobs.records import JobError, NewEvent


@pytest.fixture
def training_file(place: Place) -> str:
    return place.upload(chat_rows(60)).id


@pytest.fixture(scope="module")
def quiet_file(quiet_place: Place) -> str:
    return quiet_place.upload(chat_rows(60)).id


class TestFilesOfTheSdk:
    def test_a_file_goes_up_and_comes_back_byte_for_byte(self, client: OpenAI) -> None:
        content = chat_rows(12)
        made = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        assert_no_wrong_typed_field(made)
        assert (made.filename, made.bytes, made.purpose) == ("rows.jsonl", len(content), "fine-tune")
        assert made.status == "processed"
        assert client.files.retrieve(made.id) == made
        assert client.files.content(made.id).read() == content
        assert [file.id for file in client.files.list()] == [made.id]

    def test_a_deleted_file_is_gone_with_its_bytes(self, client: OpenAI, place: Place) -> None:
        made = client.files.create(file=("rows.jsonl", chat_rows(12)), purpose="fine-tune")
        deleted = client.files.delete(made.id)
        assert_no_wrong_typed_field(deleted)
        assert deleted.deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(made.id)
        assert place.stored_files() == []

    def test_what_is_being_read_is_read_to_its_end_though_it_is_deleted(self, client: OpenAI, place: Place) -> None:
        content = b"".join(json.dumps({"text": f"{number} {'word ' * 4000}"}).encode() + b"\n" for number in range(45))
        made = place.upload(content)
        asked = client._client.stream("GET", f"{client.base_url}files/{made.id}/content")
        with asked as answer:
            client.files.delete(made.id)
            assert answer.read() == content

    async def test_who_reads_beside_a_deletion_gets_all_or_a_404(self, url: str, place: Place) -> None:
        content, seen = chat_rows(10), Counter[int]()
        async with httpx.AsyncClient(base_url=f"{url}/v1/files", trust_env=False, timeout=60) as client:

            async def read(file_id: str) -> None:
                answer = await client.get(f"/{file_id}/content")
                seen[answer.status_code] += 1
                assert answer.status_code == 404 or answer.content == content

            for _ in range(15):
                made = place.upload(content).id
                await asyncio.gather(read(made), read(made), client.delete(f"/{made}"), read(made), read(made))
        assert set(seen) <= {200, 404}

    def test_bytes_that_are_gone_from_the_disk_are_not_there(self, client: OpenAI, place: Place) -> None:
        made = place.upload(chat_rows(10)).id
        place.files.storage.path(made).unlink()
        with pytest.raises(openai.NotFoundError, match="the content of"):
            client.files.content(made)

    def test_a_range_of_a_file_is_answered(self, client: OpenAI, place: Place) -> None:
        content = chat_rows(10)
        made = place.upload(content).id
        answer = client._client.get(f"{client.base_url}files/{made}/content", headers={"range": "bytes=5-24"})
        assert (answer.status_code, answer.content) == (206, content[5:25])

    def test_lists_are_ordered_filtered_and_paged(self, client: OpenAI, place: Place) -> None:
        ids = [add_file_row(place.file_rows) for _ in range(25)]
        results = add_file_row(place.file_rows, purpose="fine-tune-results")
        assert [file.id for file in client.files.list(order="asc", limit=10)] == [*ids, results]
        assert [file.id for file in client.files.list(limit=7)] == [results, *reversed(ids)]
        assert [file.id for file in client.files.list(purpose="fine-tune-results")] == [results]

    def test_a_file_may_be_deleted_while_the_pager_walks(self, client: OpenAI, place: Place) -> None:
        for _ in range(9):
            add_file_row(place.file_rows)
        for file in client.files.list(limit=2):
            client.files.delete(file.id)
        assert list(client.files.list()) == []


class TestJobsOfTheSdk:
    def test_a_job_shows_the_numbers_that_auto_became(self, client: OpenAI, training_file: str) -> None:
        job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
        assert_no_wrong_typed_field(job)
        assert job.status == "queued"
        assert job.object == "fine_tuning.job"
        assert job.organization_id == "acme"
        assert (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.error) == (None, None, None, None)
        assert type(job.hyperparameters.n_epochs) is int
        assert type(job.hyperparameters.batch_size) is int
        assert job.hyperparameters.learning_rate_multiplier == 1.0
        assert job.method is not None
        assert job.method.type == "supervised"
        assert job.method.supervised is not None
        assert job.method.supervised.hyperparameters is not None
        assert job.method.supervised.hyperparameters.model_dump() == job.hyperparameters.model_dump()

    def test_everything_that_was_given_is_shown(self, client: OpenAI, place: Place, training_file: str) -> None:
        validation_file = place.upload(chat_rows(12, first=1000)).id
        job = client.fine_tuning.jobs.create(
            model="Qwen/Qwen3-0.6B",
            training_file=training_file,
            validation_file=validation_file,
            suffix="support-v2",
            seed=11,
            metadata={"team": "care"},
            integrations=[],
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 12, "learning_rate_multiplier": 0.5}},
            },
            extra_body={"capo": {"lora": {"rank": 32, "target_modules": ["q_proj"]}, "alias": "support"}},
        )
        assert_no_wrong_typed_field(job)
        assert (job.model, job.seed, job.metadata) == ("Qwen/Qwen3-0.6B", 11, {"team": "care"})
        assert (job.training_file, job.validation_file) == (training_file, validation_file)
        assert job.hyperparameters.model_dump() == {
            "n_epochs": 4,
            "batch_size": 12,
            "learning_rate_multiplier": 0.5,
        }
        extension = job.to_dict()["capo"]
        assert isinstance(extension, dict)
        assert extension["lora"] == {"rank": 32, "target_modules": ["q_proj"]}
        assert extension["alias"] == "support"
        assert place.store.job(job.id).reserved_name.startswith("ft:Qwen/Qwen3-0.6B:acme:support-v2:")

    def test_hyperparameters_in_their_old_place_count(self, client: OpenAI, training_file: str) -> None:
        job = client.fine_tuning.jobs.create(
            model=BASE,
            training_file=training_file,
            hyperparameters={"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 2},
        )
        assert_no_wrong_typed_field(job)
        assert job.hyperparameters.n_epochs == 2
        assert job.hyperparameters.learning_rate_multiplier == 2.0

    def test_empty_hyperparameters_ask_for_nothing_in_either_place(self, client: OpenAI, training_file: str) -> None:
        one: Any = {"n_epochs": 1}
        for old, new in (({}, one), (one, {}), (one, None), (None, one)):
            method: Any = {"type": "supervised", "supervised": {} if new is None else {"hyperparameters": new}}
            given: Any = {} if old is None else {"hyperparameters": old}
            job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file, method=method, **given)
            assert job.hyperparameters.n_epochs == 1, (old, new)

    def test_a_job_without_a_seed_gets_one(self, client: OpenAI, training_file: str) -> None:
        jobs = [client.fine_tuning.jobs.create(model=BASE, training_file=training_file) for _ in range(2)]
        assert jobs[0].seed != jobs[1].seed

    def test_the_pager_walks_over_500_jobs_newest_first(self, client: OpenAI, place: Place) -> None:
        file_id = add_file_row(place.file_rows)
        made = [place.queue_job(file_id).id for _ in range(500)]
        assert [job.id for job in client.fine_tuning.jobs.list(limit=100)] == made[::-1]
        first = client.fine_tuning.jobs.list()
        assert len(first.data) == 20
        assert first.has_more
        for job in first.data:
            assert_no_wrong_typed_field(job)

    def test_a_page_that_ends_with_the_last_job_says_so(self, client: OpenAI, place: Place) -> None:
        file_id = add_file_row(place.file_rows)
        for _ in range(4):
            place.queue_job(file_id)
        page = client.fine_tuning.jobs.list(limit=4)
        assert (len(page.data), page.has_more) == (4, False)

    def test_jobs_are_found_by_their_metadata(self, client: OpenAI, place: Place) -> None:
        file_id = add_file_row(place.file_rows)
        odd_key = 'a"b.c]d'
        care = place.store.create_job(new_job(file_id, metadata={"team": "care", "run": "1"}))
        empty = place.store.create_job(new_job(file_id, metadata={"team": "", odd_key: "x"}))
        none = place.store.create_job(new_job(file_id))

        def found(**query: Any) -> list[str]:
            return [job.id for job in client.fine_tuning.jobs.list(**query)]

        assert found(metadata={"team": "care"}) == [care.id]
        assert found(metadata={"team": "care", "run": "2"}) == []
        assert found(metadata={"team": ""}) == [empty.id]
        assert found(metadata={odd_key: "x"}) == [empty.id]
        assert found(extra_query={"metadata": "null"}) == [none.id]
        assert found(metadata={}) == [none.id, empty.id, care.id]

    def test_cancel_answers_with_the_cancelled_job(self, client: OpenAI, training_file: str) -> None:
        job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
        cancelled = client.fine_tuning.jobs.cancel(job.id)
        assert_no_wrong_typed_field(cancelled)
        assert cancelled.status == "cancelled"
        assert client.fine_tuning.jobs.retrieve(job.id) == cancelled
        assert client.fine_tuning.jobs.cancel(job.id) == cancelled

    def test_events_come_newest_first_and_page(self, client: OpenAI, place: Place, training_file: str) -> None:
        job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
        queue = WorkQueue(place.database)
        held = queue.claim(place.store.job(job.id), owner="w", lease_seconds=30)
        assert held is not None
        metrics = {"step": 1, "train_loss": 0.5, "grad_norm": None}
        queue.add_events(held, [NewEvent(f"n{number}", kind="metrics", data=metrics) for number in range(30)])
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))
        for event in events:
            assert_no_wrong_typed_field(event)
        assert [event.message for event in events[:30]] == [f"n{number}" for number in reversed(range(30))]
        assert events[0].type == "metrics"
        assert events[0].data == metrics
        assert events[-1].message == f"Created fine-tuning job: {job.id}"
        assert len({event.id for event in events}) == len(events)

    def test_ended_jobs_have_every_field_of_their_state(self, client: OpenAI, place: Place, training_file: str) -> None:
        queue = WorkQueue(place.database)
        done, failed = (queue.claim(place.queue_job(training_file), owner="w", lease_seconds=30) for _ in "ab")
        assert done is not None
        assert failed is not None
        queue.succeed(done, Outcome("model@0123456789abcdef", 99, None))
        queue.fail(failed, JobError("invalid_data", "line 3: empty", "training_file"))
        shown = client.fine_tuning.jobs.retrieve(done.id)
        assert_no_wrong_typed_field(shown)
        assert (shown.status, shown.trained_tokens) == ("succeeded", 99)
        assert shown.fine_tuned_model == done.reserved_name
        shown = client.fine_tuning.jobs.retrieve(failed.id)
        assert_no_wrong_typed_field(shown)
        assert shown.error is not None
        assert (shown.error.code, shown.error.param) == ("invalid_data", "training_file")
        with pytest.raises(openai.ConflictError):
            client.fine_tuning.jobs.cancel(done.id)


async def test_the_asynchronous_client_works_for_every_call(url: str) -> None:
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="unused", http_client=httpx.AsyncClient(trust_env=False)
    ) as client:
        file = await client.files.create(file=("rows.jsonl", chat_rows(10)), purpose="fine-tune")
        assert (await client.files.retrieve(file.id)).id == file.id
        assert (await client.files.content(file.id)).content == chat_rows(10)
        job = await client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
        assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "queued"
        assert [listed.id async for listed in client.fine_tuning.jobs.list()] == [job.id]
        assert [event async for event in client.fine_tuning.jobs.list_events(job.id)]
        assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
        assert [listed.id async for listed in client.files.list()] == [file.id]
        assert (await client.files.delete(file.id)).deleted


# Each: what is changed in a body that works, and the field that must be named for it.
WRONG_BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": ...}, "model"),
    "no training file": ({"training_file": ...}, "training_file"),
    "model is a number": ({"model": 3}, "model"),
    "unknown model": ({"model": "gpt-9"}, "model"),
    "a file's path as model": ({"model": "../../etc/passwd"}, "model"),
    "a fine-tuned model as start": ({"model": "ft:capo-tiny:acme::abcd1234"}, "model"),
    "a revision as start": ({"model": "support@0123456789abcdef"}, "model"),
    "training file that is not there": ({"training_file": "file-none"}, "training_file"),
    "a path as training file": ({"training_file": "/etc/passwd"}, "training_file"),
    "training file is null": ({"training_file": None}, "training_file"),
    "validation file that is not there": ({"validation_file": "file-none"}, "validation_file"),
    "misspelt field": ({"sufix": "a"}, "sufix"),
    "field of another API": ({"messages": []}, "messages"),
    "suffix with capitals": ({"suffix": "Support"}, "suffix"),
    "suffix too long": ({"suffix": "a" * 65}, "suffix"),
    "suffix that climbs": ({"suffix": "../../x"}, "suffix"),
    "suffix with a colon": ({"suffix": "a:b"}, "suffix"),
    "suffix that is reserved": ({"suffix": "image"}, "suffix"),
    "suffix that is the base": ({"suffix": BASE}, "suffix"),
    "empty suffix": ({"suffix": ""}, "suffix"),
    "seed below zero": ({"seed": -1}, "seed"),
    "seed too large": ({"seed": 2**32}, "seed"),
    "seed as text": ({"seed": "1"}, "seed"),
    "seed true": ({"seed": True}, "seed"),
    "17 metadata pairs": ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
    "long metadata key": ({"metadata": {"k" * 65: ""}}, "metadata"),
    "long metadata value": ({"metadata": {"k": "v" * 513}}, "metadata"),
    "metadata value is a number": ({"metadata": {"k": 1}}, "metadata.k"),
    "metadata with NUL": ({"metadata": {"k": "\0"}}, "metadata"),
    "no epochs": ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    "half an epoch": ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs"),
    "epochs as text": ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs"),
    "epochs true": ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
    "batch too large": ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
    "no learning rate": (
        {"hyperparameters": {"learning_rate_multiplier": 0}},
        "hyperparameters.learning_rate_multiplier",
    ),
    "misspelt hyper-parameter": ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs"),
    "method without a type": ({"method": {}}, "method.type"),
    "method of another kind": ({"method": {"type": "magic"}}, "method.type"),
    "dpo on chat rows": ({"method": {"type": "dpo", "dpo": {}}}, "training_file"),
    "dpo with supervised's part": ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
    "beta of supervised": (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}}},
        "method.supervised.hyperparameters.beta",
    ),
    "beta zero": (
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}},
        "method.dpo.hyperparameters.beta",
    ),
    "reinforcement": ({"method": {"type": "reinforcement"}}, "method.type"),
    "supervised with dpo's part": ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
    "hyper-parameters in both places": (
        {
            "hyperparameters": {"n_epochs": 1},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        },
        "hyperparameters",
    ),
    "integrations": ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
    "unknown extension": ({"capo": {"gpu": 1}}, "capo.gpu"),
    "rank as text": ({"capo": {"lora": {"rank": "8"}}}, "capo.lora.rank"),
    "rank above the server's": ({"capo": {"lora": {"rank": 128}}}, "capo.lora.rank"),
    "unknown lora key": ({"capo": {"lora": {"rnk": 8}}}, "capo.lora"),
    "full training": ({"capo": {"lora": {"kind": "full"}}}, "capo.lora.kind"),
    "whole weights": ({"capo": {"method": {"kind": "full"}}}, "capo.method"),
    "extracted rank above the server's": (
        {"capo": {"method": {"kind": "full", "extract_lora_rank": 128}}},
        "capo.method",
    ),
    "two methods": ({"capo": {"method": {"kind": "lora"}, "lora": {"rank": 8}}}, "capo.method"),
    "a stage's epochs": ({"capo": {"stage": {"epochs": 3}}}, "capo.stage.epochs"),
    "another file": ({"capo": {"stage": {"data": [{"path": "/etc/passwd"}]}}}, "capo.stage.data"),
    "unknown stage key": ({"capo": {"stage": {"pack": True}}}, "stages[0]"),
    "an evaluation file": ({"capo": {"evaluation": {"data": "/etc/passwd"}}}, "capo.evaluation"),
    "a promotion of nothing": ({"capo": {"promote_if": "exact_match > base"}}, None),
    "a promotion to nowhere": (
        {"capo": {"promote_if": "loss < base", "evaluation": {}, "validation_share": 0.2}},
        "capo.promote_if",
    ),
    "an evaluation with all rows trained on": (
        {"capo": {"evaluation": {}, "validation_share": 0}},
        "capo.evaluation",
    ),
    "an unknown export": ({"capo": {"exports": [{"kind": "zip"}]}}, "exports[0]"),
    "priority too high": ({"capo": {"priority": 1001}}, "capo.priority"),
    "alias that climbs": ({"capo": {"alias": "../x"}}, "capo.alias"),
    "alias that is the base": ({"capo": {"alias": BASE}}, "capo.alias"),
    "validation share above half": ({"capo": {"validation_share": 0.9}}, "capo.validation_share"),
}


@pytest.mark.parametrize(("changes", "param"), WRONG_BODIES.values(), ids=WRONG_BODIES.keys())
def test_a_wrong_job_is_refused_with_its_field(
    quiet_client: OpenAI, quiet_place: Place, quiet_file: str, changes: dict[str, Any], param: str | None
) -> None:
    body = {"model": BASE, "training_file": quiet_file} | changes
    body = {key: value for key, value in body.items() if value is not ...}
    response = quiet_client._client.post(
        f"{quiet_client.base_url}fine_tuning/jobs",
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert error["message"]
    assert quiet_place.store.jobs(after=None, limit=1).records == []


WRONG_JSON = {
    "nothing": b"",
    "not JSON": b"model=capo-tiny",
    "a list": b"[]",
    "a string": b'"model"',
    "null": b"null",
    "not UTF-8": b'{"model": "\xff"}',
    "NaN": b'{"seed": NaN}',
    "the same key twice": b'{"model": "a", "model": "b"}',
    "half a surrogate pair": rb'{"metadata": {"k": "\ud800"}}',
    "nested without end": b'{"a":' * 50_000,
    "an endless number": b'{"seed": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", WRONG_JSON.values(), ids=WRONG_JSON.keys())
def test_a_body_that_is_no_json_object_is_refused(quiet_client: OpenAI, content: bytes) -> None:
    response = quiet_client._client.post(f"{quiet_client.base_url}fine_tuning/jobs", content=content)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_an_evaluation_that_nothing_is_held_out_for_is_refused_with_what_to_do(client: OpenAI, place: Place) -> None:
    few, pairs = place.upload(chat_rows(49)).id, place.upload(preference_rows(60)).id
    validation = place.upload(chat_rows(10, first=900)).id
    asked: dict[str, Any] = {"model": BASE, "extra_body": {"capo": {"evaluation": {}}}}
    with pytest.raises(openai.BadRequestError, match=r"validation_file or capo\.validation_share"):
        client.fine_tuning.jobs.create(training_file=few, **asked)
    with pytest.raises(openai.BadRequestError, match="preference rows are none; leave it out"):
        client.fine_tuning.jobs.create(training_file=pairs, method={"type": "dpo"}, **asked)
    client.fine_tuning.jobs.create(training_file=few, validation_file=validation, **asked)
    client.fine_tuning.jobs.create(training_file=place.upload(chat_rows(50)).id, **asked)


@pytest.mark.parametrize(
    ("library", "evaluation"), [("sacrebleu", {}), ("rouge_score", {}), ("lm_eval", {"benchmarks": [{"task": "x"}]})]
)
def test_an_evaluation_whose_library_is_not_installed_is_refused(
    client: OpenAI, place: Place, monkeypatch: pytest.MonkeyPatch, library: str, evaluation: dict[str, Any]
) -> None:
    rows = place.upload(chat_rows(50)).id
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(openai.BadRequestError, match=f"{library}.* not installed") as refused:
        client.fine_tuning.jobs.create(model=BASE, training_file=rows, extra_body={"capo": {"evaluation": evaluation}})
    assert (refused.value.code, refused.value.param) == ("evaluation_unavailable", "capo.evaluation")
    client.fine_tuning.jobs.create(model=BASE, training_file=rows)


def test_a_huge_body_is_refused_before_it_is_read(quiet_client: OpenAI) -> None:
    content = b'{"suffix": "' + b"a" * 2_000_000 + b'"}'
    response = quiet_client._client.post(f"{quiet_client.base_url}fine_tuning/jobs", content=content)
    assert response.status_code == 413


def test_a_compressed_body_is_refused(quiet_client: OpenAI) -> None:
    headers = {"content-encoding": "gzip"}
    response = quiet_client._client.post(
        f"{quiet_client.base_url}fine_tuning/jobs", content=b"\x1f\x8b", headers=headers
    )
    assert response.status_code == 400


def test_all_faults_of_a_request_are_reported_at_once(quiet_client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        quiet_client.fine_tuning.jobs.create(
            model="gpt-9", training_file="file-none", suffix="Bad Name", metadata={"k" * 65: ""}
        )
    for part in ("gpt-9", "file-none", "Bad Name", "metadata"):
        assert part in refused.value.message


def test_a_misspelt_field_is_told_its_nearest_name(client: OpenAI, training_file: str) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean 'validation_file'"):
        client.fine_tuning.jobs.create(model=BASE, training_file=training_file, extra_body={"validaton_file": "file-1"})


class TestFilesThatCannotTrain:
    def test_nine_rows_are_too_few_and_ten_are_enough(self, client: OpenAI, place: Place) -> None:
        nine, ten = place.upload(chat_rows(9)).id, place.upload(chat_rows(10)).id
        with pytest.raises(openai.BadRequestError, match="9 rows"):
            client.fine_tuning.jobs.create(model=BASE, training_file=nine)
        client.fine_tuning.jobs.create(model=BASE, training_file=ten)

    def test_a_result_file_is_no_training_file(self, client: OpenAI, place: Place) -> None:
        results = add_file_row(place.file_rows, purpose="fine-tune-results")
        with pytest.raises(openai.BadRequestError, match="purpose"):
            client.fine_tuning.jobs.create(model=BASE, training_file=results)

    def test_validating_on_the_training_rows_is_refused(self, client: OpenAI, place: Place, training_file: str) -> None:
        copy = place.upload(chat_rows(60)).id
        for validation_file in (training_file, copy):
            with pytest.raises(openai.BadRequestError, match="same content"):
                client.fine_tuning.jobs.create(model=BASE, training_file=training_file, validation_file=validation_file)

    def test_a_deleted_file_cannot_be_used(self, client: OpenAI, training_file: str) -> None:
        client.files.delete(training_file)
        with pytest.raises(openai.BadRequestError, match="no file"):
            client.fine_tuning.jobs.create(model=BASE, training_file=training_file)

    def test_a_file_in_use_cannot_be_deleted(self, client: OpenAI, training_file: str) -> None:
        job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
        with pytest.raises(openai.ConflictError, match=job.id):
            client.files.delete(training_file)


WRONG_QUERIES = [
    "/files?limit=0",
    "/files?limit=10001",
    "/files?limit=ten",
    "/files?limit=+5",
    "/files?limit=%D9%A3",
    "/files?order=newest",
    "/files?after=file-none",
    "/files?before=file-1",
    "/files?limit=1&limit=2",
    "/fine_tuning/jobs?limit=0",
    "/fine_tuning/jobs?limit=101",
    "/fine_tuning/jobs?limit=-1",
    "/fine_tuning/jobs?after=ftjob-none",
    "/fine_tuning/jobs?status=running",
    "/fine_tuning/jobs?metadata=x",
    "/fine_tuning/jobs?metadata=null&metadata%5Ba%5D=b",
]


@pytest.mark.parametrize("path", WRONG_QUERIES)
def test_a_wrong_query_is_refused(quiet_client: OpenAI, path: str) -> None:
    response = quiet_client._client.get(f"{str(quiet_client.base_url).rstrip('/')}{path}")
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"]


@pytest.mark.parametrize(
    "path",
    [
        "/files/file-none",
        "/files/..%2F..%2Fjobs.db",
        "/files/..%2F..%2Fjobs.db/content",
        "/files/incoming/content",
        "/fine_tuning/jobs/ftjob-none",
        "/fine_tuning/jobs/ftjob-none/events",
        "/fine_tuning/jobs/%00",
    ],
)
def test_what_is_not_there_is_not_found(quiet_client: OpenAI, path: str) -> None:
    response = quiet_client._client.get(f"{str(quiet_client.base_url).rstrip('/')}{path}")
    assert response.status_code == 404, response.text


def test_a_cursor_of_another_jobs_event_is_refused(client: OpenAI, place: Place) -> None:
    file_id = add_file_row(place.file_rows)
    first, second = place.queue_job(file_id), place.queue_job(file_id)
    foreign = place.store.events_since(first.id, 0)[0].id
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.list_events(second.id, after=foreign)
