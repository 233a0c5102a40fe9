"""Preference data through the stock SDK."""

from __future__ import annotations

import json

import openai
import pytest
from openai import OpenAI

from tests.tune.jobs.sdk_types import assert_no_wrong_typed_field
from tests.tune.jobs.support import BASE, Place, chat_rows, preference_rows


def test_a_dpo_job_shows_its_method_and_numbers(client: OpenAI, place: Place) -> None:
    file = client.files.create(file=("pairs.jsonl", preference_rows(60)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.25, "n_epochs": 2}}},
    )
    assert_no_wrong_typed_field(job)
    assert job.method is not None
    assert (job.method.type, job.method.supervised) == ("dpo", None)
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    numbers = job.method.dpo.hyperparameters
    assert (numbers.beta, numbers.n_epochs, type(numbers.batch_size)) == (0.25, 2, int)
    assert place.store.job(job.id).method == "dpo"


def test_supervised_training_on_pairs_is_refused(client: OpenAI) -> None:
    file = client.files.create(file=("pairs.jsonl", preference_rows(60)), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="preference rows") as refused:
        client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    assert (refused.value.param, refused.value.code) == ("training_file", "wrong_format")


@pytest.mark.parametrize("rows", [preference_rows(12) + chat_rows(1), chat_rows(12) + preference_rows(1)])
def test_a_file_of_mixed_rows_is_refused_with_the_line(client: OpenAI, rows: bytes) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    body = refused.value.body
    assert isinstance(body, dict)
    assert body["line"] == 13


def test_a_pair_of_equal_answers_is_refused(client: OpenAI) -> None:
    row = json.loads(preference_rows(1))
    row["non_preferred_output"] = row["preferred_output"]
    content = preference_rows(10) + json.dumps(row).encode() + b"\n"
    with pytest.raises(openai.BadRequestError, match="nothing to prefer"):
        client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
