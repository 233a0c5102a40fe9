"""Whole jobs through the stock SDK, the real queue and the real trainer, on capo-tiny."""

from __future__ import annotations

import csv
import io
import math
import multiprocessing
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from registry import check_adapter, locate_base_model
from tests.tune.jobs.receiver import receiver
from tests.tune.jobs.sdk_types import assert_no_wrong_typed_field, assert_no_wrong_typed_fields
from tests.tune.jobs.support import BASE, TENANT, Place, chat_rows, preference_rows, text_rows
from tests.tune.jobs.test_jobs_webhooks import sending, until
from tests.tune.jobs.test_jobs_worker import settings_for, wait_for
from tune.jobs.webhooks.endpoints import EVENT_TYPES, EndpointStore
from tune.jobs.worker import run_worker


@contextmanager
def real_worker(place: Place) -> Iterator[None]:
    """Without a stand-in: it imports the training stack."""
    process = multiprocessing.get_context("spawn").Process(
        target=run_worker, args=(settings_for(place, num_threads=1, lease_seconds=30.0, gpus=2),)
    )
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join(20)
        process.kill()
    assert process.exitcode == 0


@pytest.mark.training
async def test_two_stages_and_then_preferences_on_one_of_their_checkpoints(client: OpenAI, place: Place) -> None:
    texts, chats, pairs, held_out = (
        client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id
        for content in (text_rows(16), chat_rows(16), preference_rows(16), chat_rows(10, first=900))
    )
    with receiver() as told, real_worker(place):
        hook = EndpointStore(place.database, tenant=TENANT).create(name="n", url=told.url, event_types=EVENT_TYPES)
        first = ended(
            client,
            place,
            client.fine_tuning.jobs.create(
                model=BASE,
                training_file=chats,
                validation_file=held_out,
                suffix="sums",
                hyperparameters={"n_epochs": 3, "batch_size": 8},
                extra_body={
                    "capo": {
                        "gpus": 2,
                        "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
                        "stages": [{"kind": "cpt", "data": [{"path": texts}], "max_steps": 2}, {}],
                    }
                },
            ),
        )
        result, second, third = client.fine_tuning.jobs.checkpoints.list(first.id)
        assert_no_wrong_typed_fields([result, second, third])
        assert (result.step_number, second.step_number, third.step_number) == (8, 6, 4), "2 of texts, then 2 an epoch"
        assert result.fine_tuned_model_checkpoint == first.fine_tuned_model
        check_table_and_events(client, first, steps=8, validated={4, 6, 8})
        preferred = ended(
            client,
            place,
            client.fine_tuning.jobs.create(
                model=third.fine_tuned_model_checkpoint,
                training_file=pairs,
                method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 8, "beta": 0.3}}},
            ),
        )
        async with sending(place):
            await until(lambda: len(told.messages) == 2)
    with OpenAI(api_key="unused", webhook_secret=hook.secret) as verifier:
        events = [verifier.webhooks.unwrap(message.body, message.headers) for message in told.messages]
    # Both lay in the outbox when the sender began, and it sends several at a time: their order is not promised.
    assert {(event.type, event.data.id) for event in events} == {
        ("fine_tuning.job.succeeded", job.id) for job in (first, preferred)
    }
    check_table_and_events(client, preferred, steps=2)
    own = place.registry.resolve(str(first.fine_tuned_model)).manifest
    assert own.job_id == first.id
    assert own.lora is not None
    assert (own.lora.rank, own.lora.target_modules) == (4, ["q_proj", "v_proj"])
    assert [(data.path, data.rows_used) for data in own.data] == [(texts, 16), (chats, 16), (held_out, 10)]
    assert first.trained_tokens == own.metrics["processed_tokens"] > own.metrics["trained_tokens"] > 0
    said = " ".join(event.message for event in place.store.events_since(first.id, 0))
    assert str(place.directory) not in said
    assert "2 processes, each with its share of every step" in said, "one for each of its GPUs"
    base = locate_base_model(BASE)
    for checkpoint in (result, second, third):
        artifact = place.registry.resolve(checkpoint.fine_tuned_model_checkpoint)
        assert check_adapter(artifact.path, base_model=base).rank == 4, "what the engine's gate asks of an adapter"
    manifest = place.registry.resolve(str(preferred.fine_tuned_model)).manifest
    start = place.registry.resolve(third.fine_tuned_model_checkpoint)
    assert manifest.parents == [start.revision]
    assert manifest.lora == start.manifest.lora
    assert manifest.tenant == start.manifest.tenant == TENANT
    assert str(preferred.fine_tuned_model).startswith(f"ft:{BASE}:{TENANT}::")


def ended(client: OpenAI, place: Place, job: FineTuningJob) -> FineTuningJob:
    wait_for(place, job.id, "succeeded", "failed", seconds=180)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert_no_wrong_typed_field(done)
    assert done.error is None
    return done


def check_table_and_events(client: OpenAI, job: FineTuningJob, *, steps: int, validated: Collection[int] = ()) -> None:
    (table,) = job.result_files
    rows = list(csv.DictReader(io.StringIO(client.files.content(table).text)))
    assert [int(row["step"]) for row in rows] == list(range(1, steps + 1)), "stages are counted through"
    events = [event for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    figures = {event.data["step"]: event.data for event in events}
    assert {int(row["step"]): float(row["train_loss"]) for row in rows} == {
        step: data["train_loss"] for step, data in figures.items()
    }
    assert [int(row["step"]) for row in rows if row["valid_loss"]] == sorted(validated)
    assert {int(row["step"]): float(row["full_valid_loss"]) for row in rows if row["full_valid_loss"]} == {
        step: data["full_valid_loss"] for step, data in figures.items() if "full_valid_loss" in data
    }
    assert job.trained_tokens == figures[steps]["trained_tokens"] > 0
    assert {data["total_steps"] for data in figures.values()} == {steps}
    if job.method is not None and job.method.type == "dpo":
        assert figures[1]["train_loss"] == pytest.approx(math.log(2), abs=1e-4), "the adapter is its own reference"
