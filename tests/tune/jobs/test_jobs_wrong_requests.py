"""Wrong requests in one table: OpenAI's status, and OpenAI's error object with the code and the field at fault.

Bodies of jobs that are wrong in one field each are many more: ``test_jobs_api.py`` has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai import OpenAI

from serve.catalog import Catalog
from serve.routes.models import models_router
from tests.tune.jobs.published import publish_adapter, publish_job
from tests.tune.jobs.support import BASE, Place, add_file_row, chat_rows, client_of, open_place, preference_rows, serve
from tests.tune.jobs.support import text_rows as texts
from tune.jobs.queue import Outcome, WorkQueue

FOREIGN = "ft:capo-tiny:other::abcd1234"


@dataclass(frozen=True)
class Wrong:
    """``{...}`` in a path or a body stands for what the place of these tests holds."""

    method: str
    path: str
    status: int
    code: str | None
    param: str | None
    body: Any = None
    raw: bytes | None = None


def job(status: int, code: str, param: str | None, **changes: Any) -> Wrong:
    body = {"model": BASE, "training_file": "{chat}"} | changes
    return Wrong("POST", "/fine_tuning/jobs", status, code, param, body)


WRONG: dict[str, Wrong] = {
    "file that is not there": job(400, "file_not_found", "training_file", training_file="file-none"),
    "file of results": job(400, "wrong_purpose", "training_file", training_file="{results}"),
    "nine rows": job(400, "too_few_rows", "training_file", training_file="{nine}"),
    "preferences for supervised": job(400, "wrong_format", "training_file", training_file="{pairs}"),
    "chats for dpo": job(400, "wrong_format", "training_file", method={"type": "dpo"}),
    "texts for supervised": job(400, "wrong_format", "training_file", training_file="{texts}"),
    "validation on the training rows": job(400, "invalid_request", "validation_file", validation_file="{chat}"),
    "unknown model": job(400, "model_not_available", "model", model="gpt-4o"),
    "fine-tuned model that is not there": job(400, "model_not_available", "model", model="ft:capo-tiny:acme::none"),
    "fine-tuned model of another tenant": job(400, "model_not_available", "model", model=FOREIGN),
    "fine-tuned model of another base": job(400, "model_not_available", "model", model="{other_base}"),
    "an alias as model": job(400, "model_not_available", "model", model="made"),
    "another rank than the start's": job(
        400, "shape_is_fixed", "capo.method.rank", model="{model}", capo={"lora": {"rank": 8}}
    ),
    "whole weights from an adapter": job(
        400, "invalid_recipe", None, model="{model}", capo={"method": {"kind": "full", "extract_lora_rank": 4}}
    ),
    "epochs out of range": job(400, "invalid_request", "hyperparameters.n_epochs", hyperparameters={"n_epochs": 51}),
    "batch as text": job(400, "invalid_request", "hyperparameters.batch_size", hyperparameters={"batch_size": "8"}),
    "suffix too long": job(400, "invalid_suffix", "suffix", suffix="a" * 65),
    "suffix with capitals": job(400, "invalid_suffix", "suffix", suffix="Support"),
    "suffix with a space": job(400, "invalid_suffix", "suffix", suffix="customer care"),
    "empty suffix": job(400, "invalid_suffix", "suffix", suffix=""),
    "suffix that is reserved": job(400, "invalid_suffix", "suffix", suffix="default"),
    "suffix that is a base model": job(400, "invalid_suffix", "suffix", suffix=BASE),
    "metadata too long": job(400, "invalid_request", "metadata", metadata={"k": "v" * 513}),
    "seed below zero": job(400, "invalid_request", "seed", seed=-1),
    "unknown field": job(400, "unknown_field", "learning_rate", learning_rate=1),
    "reinforcement": job(400, "method_not_offered", "method.type", method={"type": "reinforcement"}),
    "wandb that no worker could do": job(
        400, "integration_unavailable", "integrations", integrations=[{"type": "wandb", "wandb": {"project": "p"}}]
    ),
    "wandb without a project": job(
        400, "invalid_request", "integrations.0.wandb.project", integrations=[{"type": "wandb", "wandb": {}}]
    ),
    "integration of another kind": job(
        400, "invalid_request", "integrations.0.type", integrations=[{"type": "mlflow", "wandb": {"project": "p"}}]
    ),
    "two integrations": job(
        400, "invalid_request", "integrations", integrations=[{"type": "wandb", "wandb": {"project": "p"}}] * 2
    ),
    "stages without an open one": job(
        400, "invalid_request", "capo.stages", capo={"stages": [{"kind": "cpt", "data": [{"path": "{texts}"}]}]}
    ),
    "stages with two open ones": job(400, "invalid_request", "capo.stages", capo={"stages": [{}, {}]}),
    "stage beside stages": job(400, "invalid_request", "capo.stage", capo={"stages": [{}], "stage": {}}),
    "stage of a path": job(
        400, "file_not_found", "capo.stages[0]",
        capo={"stages": [{"kind": "cpt", "data": [{"path": "/etc/passwd"}]}, {}]},
    ),
    "stage of the wrong rows": job(
        400, "wrong_format", "capo.stages[0]", capo={"stages": [{"kind": "cpt", "data": [{"path": "{chat}"}]}, {}]}
    ),
    "stage that decides the epochs": job(
        400, "invalid_request", "capo.stages[0].epochs", capo={"stages": [{"epochs": 3}]}
    ),
    "running a grader": Wrong("POST", "/fine_tuning/alpha/graders/run", 400, "method_not_offered", "grader", {}),
    "checking a grader": Wrong("POST", "/fine_tuning/alpha/graders/validate", 400, "method_not_offered", "grader", {}),
    "no JSON": Wrong("POST", "/fine_tuning/jobs", 400, "invalid_json", None, raw=b"model=capo-tiny"),
    "cancel of a finished job": Wrong("POST", "/fine_tuning/jobs/{done}/cancel", 409, "job_already_ended", None),
    "pause of a finished job": Wrong("POST", "/fine_tuning/jobs/{done}/pause", 409, "job_already_ended", None),
    "resume of a finished job": Wrong("POST", "/fine_tuning/jobs/{done}/resume", 409, "job_already_ended", None),
    "job that is not there": Wrong("GET", "/fine_tuning/jobs/ftjob-none", 404, "not_found", None),
    "events of no job": Wrong("GET", "/fine_tuning/jobs/ftjob-none/events", 404, "not_found", None),
    "checkpoints of no job": Wrong("GET", "/fine_tuning/jobs/ftjob-none/checkpoints", 404, "not_found", None),
    "cursor of no checkpoint": Wrong(
        "GET", "/fine_tuning/jobs/{done}/checkpoints?after=ftckpt_none", 400, "invalid_cursor", "after"
    ),
    "too many checkpoints at a time": Wrong(
        "GET", "/fine_tuning/jobs/{done}/checkpoints?limit=101", 400, "invalid_request", "limit"
    ),
    "jobs by an unknown filter": Wrong("GET", "/fine_tuning/jobs?status=running", 400, "invalid_request", "status"),
    "deleting a file in use": Wrong("DELETE", "/files/{busy}", 409, "file_in_use", None),
    "deleting a file that only a stage uses": Wrong("DELETE", "/files/{busy_texts}", 409, "file_in_use", None),
    "deleting no file": Wrong("DELETE", "/files/file-none", 404, "not_found", None),
    "content of no file": Wrong("GET", "/files/file-none/content", 404, "not_found", None),
    "file by JSON": Wrong("POST", "/files", 400, "not_a_form", None, {"purpose": "fine-tune"}),
    "upload too large": Wrong(
        "POST", "/uploads", 413, "file_too_large", "bytes",
        {"bytes": 10**12, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"},
    ),
    "upload of another purpose": Wrong(
        "POST", "/uploads", 400, "invalid_purpose", "purpose",
        {"bytes": 1, "filename": "a", "mime_type": "text/jsonl", "purpose": "batch"},
    ),
    "completion of no upload": Wrong(
        "POST", "/uploads/upload_none/complete", 404, "not_found", None, {"part_ids": ["a"]}
    ),
    "completion without parts": Wrong(
        "POST", "/uploads/upload_none/complete", 400, "invalid_request", "part_ids", {"part_ids": []}
    ),
    "permissions of no model": Wrong(
        "GET", "/fine_tuning/checkpoints/ft:capo-tiny:acme::none/permissions", 404, "model_not_found", "model"
    ),
    "permissions of another tenant's model": Wrong(
        "POST", f"/fine_tuning/checkpoints/{FOREIGN}/permissions", 404, "model_not_found", "model",
        {"project_ids": ["acme"]},
    ),
    "permissions of the base": Wrong(
        "GET", f"/fine_tuning/checkpoints/{BASE}/permissions", 404, "model_not_found", "model"
    ),
    "permission for nobody": Wrong(
        "POST", "/fine_tuning/checkpoints/{model}/permissions", 400, "invalid_request", "project_ids",
        {"project_ids": []},
    ),
    "permission for what is no tenant": Wrong(
        "POST", "/fine_tuning/checkpoints/{model}/permissions", 400, "invalid_project", "project_ids",
        {"project_ids": ["../x"]},
    ),
    "permission that is not there": Wrong(
        "DELETE", "/fine_tuning/checkpoints/{model}/permissions/cp_none", 404, "not_found", None
    ),
    "permissions in OpenAI's other words": Wrong(
        "GET", "/fine_tuning/checkpoints/{model}/permissions?order=asc", 400, "invalid_request", "order"
    ),
    "model that is not there": Wrong("GET", "/models/ft:capo-tiny:acme::none", 404, "model_not_found", "model"),
    "deleting the base": Wrong("DELETE", f"/models/{BASE}", 403, "base_model", "model"),
    "webhook to nowhere": Wrong(
        "POST", "/webhook_endpoints", 400, "invalid_url", "url",
        {"name": "a", "url": "file:///etc/passwd", "event_types": ["fine_tuning.job.failed"]},
    ),
}  # fmt: skip

TYPES = {403: "permission_error"}
EXCEPTIONS = {
    400: openai.BadRequestError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OpenAI, Place, dict[str, str]]]:
    place = open_place(tmp_path_factory.mktemp("world"))
    queue = WorkQueue(place.database)
    names = {
        "chat": place.upload(chat_rows(60)).id,
        "nine": place.upload(chat_rows(9)).id,
        "pairs": place.upload(preference_rows(60)).id,
        "texts": place.upload(texts(60)).id,
        "busy": place.upload(chat_rows(61)).id,
        "busy_texts": place.upload(texts(61)).id,
        "results": add_file_row(place.file_rows, purpose="fine-tune-results"),
    }
    held = queue.claim(place.queue_job(names["chat"]), owner="w", lease_seconds=30)
    assert held is not None
    publish_job(place, held, steps=8, checkpoints=(4,))
    queue.succeed(held, Outcome("made@0123456789abcdef", 9, None))
    names |= {"done": held.id, "model": held.reserved_name, "other_base": "ft:Qwen/Qwen3-0.6B:acme::abcd1234"}
    publish_adapter(place, names["other_base"], base="another")
    publish_adapter(place, FOREIGN, tenant="other")
    place.queue_job(names["busy"], further_files=(names["busy_texts"],))
    with serve(place, models_router(Catalog(place.registry, BASE))) as url, client_of(url) as client:
        yield client, place, names
    place.database.close()


def filled(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(f"{{{name}}}", text)
        return value
    if isinstance(value, dict):
        return {key: filled(item, names) for key, item in value.items()}
    return [filled(item, names) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_it_is_refused_as_openai_refuses(world: tuple[OpenAI, Place, dict[str, str]], wrong: Wrong) -> None:
    client, place, names = world
    content = wrong.raw if wrong.raw is not None else None
    if wrong.body is not None:
        content = json.dumps(filled(wrong.body, names)).encode()
    response = client._client.request(
        wrong.method,
        f"{str(client.base_url).rstrip('/')}{filled(wrong.path, names)}",
        content=content,
        headers={"content-type": "application/json"},
    )
    assert response.status_code == wrong.status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == TYPES.get(wrong.status, "invalid_request_error")
    assert (error["code"], error["param"]) == (wrong.code, wrong.param), error
    assert len(error["message"]) > 20
    assert str(place.directory) not in response.text
    raised = client._make_status_error_from_response(response)
    assert type(raised) is EXCEPTIONS.get(wrong.status, openai.APIStatusError)
    assert (raised.code, raised.param) == (wrong.code, wrong.param)


def test_there_are_many_of_them() -> None:
    assert len(WRONG) >= 30
