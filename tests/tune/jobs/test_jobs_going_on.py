"""Jobs that start from fine-tuned models, have several stages, or are shown elsewhere: what a worker will be told."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai import OpenAI

from registry.errors import InvalidRequestError
from tests.tune.jobs.published import publish_adapter, publish_job
from tests.tune.jobs.sdk_types import assert_no_wrong_typed_field
from tests.tune.jobs.support import BASE, TENANT, Place, chat_rows, preference_rows, text_rows
from tests.tune.jobs.test_jobs_worker import settings_for
from tune.jobs import integrations
from tune.jobs.file_store import FileStore
from tune.jobs.queue import WorkQueue
from tune.jobs.records import JobRecord
from tune.jobs.store import JobStore
from tune.jobs.training import JobRun
from tune.methods import LoraMethod
from tune.recipe import Recipe


@pytest.fixture
def training_file(place: Place) -> str:
    return place.upload(chat_rows(60)).id


def recipe_of(place: Place, job_id: str) -> Recipe:
    """What the worker makes of the stored job."""
    database = place.database
    run = JobRun(
        settings_for(place),
        job=place.store.job(job_id),
        queue=WorkQueue(database),
        store=JobStore(database),
        files=FileStore(database),
        stop_asked=lambda: False,
    )
    return run._recipe()


def trained(place: Place, training_file: str) -> JobRecord:
    job = place.queue_job(training_file)
    publish_job(place, job, steps=12, checkpoints=(4, 8))
    return job


class TestStartingFromAModel:
    @pytest.mark.parametrize("checkpoint", ["", ":ckpt-step-8"])
    def test_the_job_goes_on_from_it_on_its_base(
        self, client: OpenAI, place: Place, training_file: str, checkpoint: str
    ) -> None:
        model = trained(place, training_file).reserved_name + checkpoint
        job = client.fine_tuning.jobs.create(model=model, training_file=training_file, suffix="more")
        assert_no_wrong_typed_field(job)
        assert job.model == model
        stored = place.store.job(job.id)
        assert stored.reserved_name.startswith(f"ft:{BASE}:{TENANT}:more:"), "as OpenAI names them: after the base"
        recipe = recipe_of(place, job.id)
        assert (recipe.base_model, recipe.start_from) == (BASE, model)
        assert isinstance(recipe.method, LoraMethod)
        assert recipe.method.model_fields_set == set(), "the adapter decides its shape"

    def test_the_adapters_own_rank_may_be_said(self, client: OpenAI, place: Place, training_file: str) -> None:
        model = trained(place, training_file).reserved_name
        for capo in ({"lora": {"rank": 4}}, {"method": {"kind": "qlora", "rank": 4, "dropout": 0.1}}):
            client.fine_tuning.jobs.create(model=model, training_file=training_file, extra_body={"capo": capo})
        with pytest.raises(openai.BadRequestError, match="keeps its shape"):
            client.fine_tuning.jobs.create(
                model=model, training_file=training_file, extra_body={"capo": {"lora": {"rank": 16}}}
            )

    def test_a_deleted_model_is_not_started_from(self, client: OpenAI, place: Place, training_file: str) -> None:
        model = trained(place, training_file).reserved_name
        place.registry.remove_alias(model)
        with pytest.raises(openai.BadRequestError, match="does not exist"):
            client.fine_tuning.jobs.create(model=model, training_file=training_file)

    def test_anothers_model_is_started_from_once_its_owner_allows_it(
        self, client: OpenAI, place: Place, training_file: str
    ) -> None:
        model = "ft:capo-tiny:other::abcd1234"
        publish_adapter(place, model, tenant="other")
        refusals = []
        for name in (model, "ft:capo-tiny:other::none1234"):
            with pytest.raises(openai.BadRequestError) as refused:
                client.fine_tuning.jobs.create(model=name, training_file=training_file)
            refusals.append(refused.value.message.replace(name, ""))
        assert refusals[0] == refusals[1], "a foreign model answers like one that is not there"
        (permission,) = place.api.permissions.grant(model, [TENANT])
        assert place.api.permissions.is_shared_with(model, TENANT)
        client.fine_tuning.jobs.create(model=model, training_file=training_file)
        place.api.permissions.revoke(model, permission.id)
        with pytest.raises(openai.BadRequestError):
            client.fine_tuning.jobs.create(model=model, training_file=training_file)

    def test_granting_at_the_same_moment_makes_one_permission(self, any_place: Place) -> None:
        store = any_place.api.permissions
        with ThreadPoolExecutor(4) as pool:
            granted = list(pool.map(lambda _: store.grant("ft:a:b::c", ["red", "blue"]), range(8)))
        assert all(permissions == granted[0] for permissions in granted)

    def test_granting_again_changes_nothing(self, place: Place) -> None:
        first = place.api.permissions.grant("ft:a:b::c", ["red", "blue", "red"])
        assert [granted.project_id for granted in first] == ["red", "blue"]
        assert place.api.permissions.grant("ft:a:b::c", ["blue", "red"]) == first[::-1]


class TestStages:
    def test_each_reads_its_own_files_and_the_open_one_is_openais(
        self, client: OpenAI, place: Place, training_file: str
    ) -> None:
        texts, more, pairs = (
            place.upload(content).id for content in (text_rows(20), chat_rows(20, first=500), preference_rows(20))
        )
        stages: list[dict[str, Any]] = [
            {"kind": "cpt", "data": [{"path": texts}], "max_steps": 3},
            {"scheduler": "linear", "neftune_alpha": 5.0},
            {
                "kind": "mixed",
                "data": [{"path": more, "weight": 2.0}, {"path": texts}],
                "validation": {"path": training_file},
            },
            {"kind": "dpo", "data": [{"path": pairs}], "dpo": {"beta": 0.2}},
        ]
        job = client.fine_tuning.jobs.create(
            model=BASE,
            training_file=training_file,
            hyperparameters={"n_epochs": 2, "batch_size": 4},
            extra_body={"capo": {"stages": stages, "exports": [{"kind": "merge"}], "checkpoint_every_steps": 7}},
        )
        assert_no_wrong_typed_field(job)
        assert job.to_dict()["capo"]["stages"] == stages
        recipe = recipe_of(place, job.id)
        assert [stage.kind for stage in recipe.stages] == ["cpt", "sft", "mixed", "dpo"]
        own = recipe.stages[1]
        assert (str(own.data[0].path), own.epochs, own.scheduler, own.neftune_alpha) == (
            training_file,
            2.0,
            "linear",
            5.0,
        )
        assert own.validation is not None
        assert own.validation.share == 0.1, "the tenth that is held out is of the request's own rows"
        assert (str(recipe.stages[2].data[0].path), recipe.stages[2].data[0].weight) == (more, 2.0)
        assert recipe.stages[3].dpo is not None
        assert recipe.stages[3].dpo.beta == 0.2
        assert recipe.checkpoint_every_steps == 7
        for file_id in (texts, more, pairs):
            with pytest.raises(openai.ConflictError, match=job.id):
                client.files.delete(file_id)
        client.fine_tuning.jobs.cancel(job.id)
        client.files.delete(texts)

    def test_a_file_of_a_stage_that_changed_since_its_upload_is_noticed(
        self, client: OpenAI, place: Place, training_file: str
    ) -> None:
        texts = place.upload(text_rows(20)).id
        job = client.fine_tuning.jobs.create(
            model=BASE,
            training_file=training_file,
            extra_body={"capo": {"stages": [{"kind": "cpt", "data": [{"path": texts}]}, {}]}},
        )
        place.files.storage.path(texts).write_bytes(text_rows(19))
        with pytest.raises(InvalidRequestError, match="has changed since its upload"):
            recipe_of(place, job.id)

    def test_texts_are_uploaded_and_checked_by_line(self, client: OpenAI) -> None:
        made = client.files.create(file=("texts.jsonl", text_rows(5)), purpose="fine-tune")
        assert made.status == "processed"
        with pytest.raises(openai.BadRequestError) as refused:
            client.files.create(file=("texts.jsonl", text_rows(5) + chat_rows(1)), purpose="fine-tune")
        assert isinstance(refused.value.body, dict)
        assert refused.value.body["line"] == 6


ASKED: dict[str, Any] = {
    "type": "wandb",
    "wandb": {"project": "tuning", "name": "try 3", "entity": "team", "tags": ["care"]},
}


class TestWandb:
    @pytest.fixture
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__spec__=SimpleNamespace(name="wandb")))
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)

    @pytest.mark.usefixtures("installed")
    def test_it_is_shown_and_reaches_the_tracker(self, client: OpenAI, place: Place, training_file: str) -> None:
        job = client.fine_tuning.jobs.create(
            model=BASE,
            training_file=training_file,
            integrations=[ASKED],
        )
        assert_no_wrong_typed_field(job)
        assert job.integrations is not None
        assert [integration.to_dict() for integration in job.integrations] == [ASKED]
        assert client.fine_tuning.jobs.retrieve(job.id) == job
        recipe = recipe_of(place, job.id)
        assert recipe.trackers == ("wandb",)
        assert recipe.wandb is not None
        assert (recipe.wandb.project, recipe.wandb.name, recipe.wandb.entity) == ("tuning", "try 3", "team")
        assert recipe.wandb.tags == ("capo/finetune", f"capo/{BASE}", f"capo/{job.id}", "care")

    @pytest.mark.usefixtures("installed")
    def test_without_a_name_the_run_has_the_jobs(self, client: OpenAI, place: Place, training_file: str) -> None:
        job = client.fine_tuning.jobs.create(
            model=BASE, training_file=training_file, integrations=[{"type": "wandb", "wandb": {"project": "p"}}]
        )
        wandb = recipe_of(place, job.id).wandb
        assert wandb is not None
        assert wandb.name == job.id

    @pytest.mark.usefixtures("installed")
    def test_without_a_key_it_is_refused(
        self, client: OpenAI, training_file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        monkeypatch.delenv("WANDB_API_KEY")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        with pytest.raises(openai.BadRequestError, match="WANDB_API_KEY"):
            client.fine_tuning.jobs.create(model=BASE, training_file=training_file, integrations=[ASKED])
        assert integrations.wandb_problem({"WANDB_MODE": "offline"}) is None
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
        assert integrations.wandb_problem({"NETRC": str(tmp_path / "netrc")}) is None

    def test_without_the_package_it_is_refused(self, client: OpenAI, training_file: str) -> None:
        with pytest.raises(openai.BadRequestError, match=r"pip install 'capo-llm\[wandb\]'"):
            client.fine_tuning.jobs.create(model=BASE, training_file=training_file, integrations=[ASKED])
