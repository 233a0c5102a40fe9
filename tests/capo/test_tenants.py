"""Two tenants behind one door: what is one's is for the other as if it were nobody's."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from capo.access_rules import HTTP_RULES, RULES
from capo_proto.v1 import adapters_pb2, inference_pb2, tuning_pb2
from registry.errors import ConflictError, PermissionDeniedError, UnavailableError
from registry.principal import Scope
from tests.capo.guarded import HOUSE, Guarded, KeptShares, bearer, filled, guarded
from tests.serve.running import BASE
from tests.tune.jobs.support import chat_rows


@dataclass
class Belongings:
    """What a tenant has: one of each thing that has a name or an id."""

    model: str
    alias: str
    revision: str
    file: str
    upload: str
    job: str
    permission: str
    endpoint: str

    def values(self) -> dict[str, str]:
        """By the names of the routes' parameters."""
        return {
            "model": self.model,
            "alias": self.alias,
            "reference": self.revision,
            "file_id": self.file,
            "upload_id": self.upload,
            "job_id": self.job,
            "permission_id": self.permission,
            "endpoint_id": self.endpoint,
        }


MISSING = Belongings(
    model="ft:capo-tiny:acme:support:nobodys1",
    alias="nobodys",
    revision="support@0123456789abcdef",
    file="file-000000000000000000000000",
    upload="upload_00000000000000000000000000000000",
    job="ftjob-000000000000000000000000",
    permission="cp_000000000000000000000000",
    endpoint="we_000000000000000000000000",
)
COMPLETE = {"part_ids": ["part_000000000000000000000000"]}
BODIES: dict[str, Any] = {
    "POST /v1/uploads/{upload_id}/complete": COMPLETE,
    "POST /v1/fine_tuning/checkpoints/{model:path}/permissions": {"project_ids": ["umbrella"]},
}

INFERENCE: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
    "POST /v1/completions": {"prompt": "hello"},
    "POST /v1/responses": {"input": "hello"},
    "POST /tokenize": {"prompt": "hello"},
    "POST /detokenize": {"tokens": [104, 105]},
}
"""What each route of inference answers, but for the model."""


async def furnish(service: Guarded, tenant: str, key: str) -> Belongings:
    """One of everything, made as a client makes it; models as a job publishes them."""

    async def made(operation: str, **options: Any) -> Any:
        answer = await service.ask(operation, key, **options)
        assert answer.status == 200, (operation, answer)
        return answer.body

    form = {"files": {"file": ("rows.jsonl", chat_rows(12))}, "data": {"purpose": "fine-tune"}}
    file = await made("POST /v1/files", **form)
    announced = {"bytes": 10, "filename": "a.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}
    upload = await made("POST /v1/uploads", json=announced)
    job = await made("POST /v1/fine_tuning/jobs", json={"model": BASE, "training_file": file["id"]})
    model = f"ft:{BASE}:{tenant}:support:abcdef12"
    artifact = service.publish("support", tenant, alias=f"{tenant}-support", fine_tuned_name=model)
    await service.service.catalog.refresh()
    granted = await made(
        "POST /v1/fine_tuning/checkpoints/{model:path}/permissions",
        path=f"/v1/fine_tuning/checkpoints/{model}/permissions",
        json={"project_ids": ["a-third-tenant"]},
    )
    endpoint = await made(
        "POST /v1/webhook_endpoints",
        json={"name": "ops", "url": "https://hooks.example.com/x", "event_types": ["fine_tuning.job.failed"]},
    )
    return Belongings(
        model=model,
        alias=f"{tenant}-support",
        revision=artifact.revision,
        file=file["id"],
        upload=upload["id"],
        job=job["id"],
        permission=granted["data"][0]["id"],
        endpoint=endpoint["id"],
    )


def without(text: Any, belongings: Belongings) -> str:
    """An answer without the names that were asked for, so that two answers can be compared."""
    shown = text if isinstance(text, str) else json.dumps(text)
    for name, value in sorted(belongings.values().items(), key=lambda item: -len(item[1])):
        shown = shown.replace(value, f"<{name}>")
    return shown


async def test_what_another_tenant_has_answers_exactly_like_what_nobody_has(tmp_path: Path) -> None:
    asked = [operation for operation in RULES if "{" in operation]
    async with guarded(tmp_path) as service:
        acme, umbrella = bearer(service.key("acme")), bearer(service.key("umbrella"))
        theirs = await furnish(service, "acme", acme)
        told_apart = {}
        for operation in asked:
            template = operation.partition(" ")[2]
            body = BODIES.get(operation)
            answers = []
            for belongings in (theirs, MISSING):
                options: dict[str, Any] = {} if body is None else {"json": body}
                if operation.endswith("/parts"):
                    options = {"files": {"data": ("part", b"0123456789")}}
                elif operation.startswith("PUT /v1/aliases"):
                    options = {"json": {"revision": belongings.revision}}
                path = filled(template, **belongings.values())
                answer = await service.ask(operation, umbrella, path=path, **options)
                assert "offered" not in str(answer.body) or answer.status != 404, (operation, answer)
                answers.append((answer.status, answer.code, without(answer.body, belongings)))
            if answers[0] != answers[1] or answers[0][0] < 400:
                told_apart[operation] = answers
        still_there = await service.ask("GET /v1/files/{file_id}", acme, path=f"/v1/files/{theirs.file}")
    assert told_apart == {}, "\n".join(f"{operation}: {told}" for operation, told in told_apart.items())
    assert len(asked) >= 25
    assert still_there.status == 200


async def test_a_name_that_another_tenant_has_cannot_be_taken_from_it(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        acme, umbrella = bearer(service.key("acme")), bearer(service.key("umbrella"))
        theirs = await furnish(service, "acme", acme)
        own = await furnish(service, "umbrella", umbrella)
        taken = await service.ask(
            "PUT /v1/aliases/{alias:path}",
            umbrella,
            path=f"/v1/aliases/{theirs.alias}",
            json={"revision": own.revision},
        )
        still = await service.ask("GET /v1/aliases/{alias:path}", acme, path=f"/v1/aliases/{theirs.alias}")
    assert (taken.status, taken.code) == (409, "alias_taken")
    assert still.body["revision"] == theirs.revision


async def test_a_job_cannot_take_another_tenants_alias_when_it_is_made_nor_when_it_is_published(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        acme, umbrella = bearer(service.key("acme")), bearer(service.key("umbrella"))
        theirs, own = await furnish(service, "acme", acme), await furnish(service, "umbrella", umbrella)
        told = [
            await service.ask(
                "POST /v1/fine_tuning/jobs",
                umbrella,
                json={"model": BASE, "training_file": own.file, "capo": {"alias": alias}},
            )
            for alias in (theirs.alias, own.alias, "nobodys")
        ]
        with pytest.raises(ConflictError, match="taken"):
            service.publish("other", "umbrella", alias=theirs.alias)
        service.publish("other", None, alias="common")
        with pytest.raises(PermissionDeniedError, match="shared"):
            service.publish("other", "umbrella", alias="common")
        assert service.registry.alias(theirs.alias).revision == theirs.revision
    assert [(answer.status, answer.code) for answer in told] == [(400, "alias_taken"), (200, None), (200, None)]


async def test_lists_show_a_tenants_own_things_and_what_all_share(tmp_path: Path) -> None:
    lists = [
        operation
        for operation in RULES
        if operation.startswith("GET /v1/") and "{" not in operation and operation != "GET /v1/pins"
    ]
    async with guarded(tmp_path) as service:
        keys = {tenant: bearer(service.key(tenant)) for tenant in ("acme", "umbrella")}
        theirs = {tenant: await furnish(service, tenant, key) for tenant, key in keys.items()}
        shared = service.publish("common", None, alias="common")
        await service.service.catalog.refresh()
        for tenant, key in keys.items():
            other = theirs["umbrella" if tenant == "acme" else "acme"]
            texts = {operation: json.dumps((await service.ask(operation, key)).body) for operation in lists}
            for value in other.values().values():
                assert [operation for operation, text in texts.items() if value in text] == [], (tenant, value)
            mine = theirs[tenant]
            assert mine.file in texts["GET /v1/files"]
            assert mine.job in texts["GET /v1/fine_tuning/jobs"]
            assert mine.endpoint in texts["GET /v1/webhook_endpoints"]
            assert mine.alias in texts["GET /v1/models"]
            assert shared.revision in texts["GET /v1/adapters"]
            assert mine.revision in texts["GET /v1/adapters"]
            assert '"common"' in texts["GET /v1/aliases"]
    assert len(lists) == 6


async def test_inference_reaches_own_models_and_shared_ones_and_no_others(tmp_path: Path) -> None:
    asked = {operation for operation, rule in HTTP_RULES.items() if rule.scopes == {Scope.INFER}}
    assert asked == set(INFERENCE), "a new route needs a body"
    async with guarded(tmp_path) as service:
        acme, umbrella = bearer(service.key("acme")), bearer(service.key("umbrella"))
        theirs = await furnish(service, "acme", acme)
        service.publish("common", None, alias="common")
        await service.service.catalog.refresh()
        for operation, body in INFERENCE.items():
            for name in (theirs.alias, theirs.model, theirs.revision):
                own = await service.ask(operation, acme, json=body | {"model": name})
                foreign = await service.ask(operation, umbrella, json=body | {"model": name})
                missing = await service.ask(operation, umbrella, json=body | {"model": "nobodys"})
                assert own.status == 200, (operation, own)
                assert (foreign.status, foreign.code) == (missing.status, missing.code) == (404, "model_not_found")
                assert foreign.body["error"]["message"].replace(name, "nobodys") == missing.body["error"]["message"]
            assert (await service.ask(operation, umbrella, json=body | {"model": "common"})).status == 200


async def test_grpc_hides_the_same(tmp_path: Path) -> None:
    message = inference_pb2.Message(role="user", content="hello")
    async with guarded(tmp_path) as service:
        acme, umbrella = bearer(service.key("acme")), bearer(service.key("umbrella"))
        theirs = await furnish(service, "acme", acme)
        requests = {
            "/capo.v1.Inference/Chat": lambda b: inference_pb2.ChatRequest(model=b.model, messages=[message]),
            "/capo.v1.Inference/ChatStream": lambda b: inference_pb2.ChatRequest(model=b.alias, messages=[message]),
            "/capo.v1.Inference/Complete": lambda b: inference_pb2.CompletionRequest(model=b.model, prompt="x"),
            "/capo.v1.Inference/CompleteStream": lambda b: inference_pb2.CompletionRequest(model=b.model, prompt="x"),
            "/capo.v1.Tuning/GetJob": lambda b: tuning_pb2.GetJobRequest(job_id=b.job),
            "/capo.v1.Tuning/CancelJob": lambda b: tuning_pb2.CancelJobRequest(job_id=b.job),
            "/capo.v1.Tuning/PauseJob": lambda b: tuning_pb2.PauseJobRequest(job_id=b.job),
            "/capo.v1.Tuning/ResumeJob": lambda b: tuning_pb2.ResumeJobRequest(job_id=b.job),
            "/capo.v1.Tuning/FollowJob": lambda b: tuning_pb2.FollowJobRequest(job_id=b.job),
            "/capo.v1.Tuning/CreateJob": lambda b: tuning_pb2.CreateJobRequest(model=BASE, training_file=b.file),
            "/capo.v1.Adapters/PinAdapter": lambda b: adapters_pb2.PinAdapterRequest(reference=b.revision),
            "/capo.v1.Adapters/UnpinAdapter": lambda b: adapters_pb2.UnpinAdapterRequest(reference=b.revision),
            "/capo.v1.Adapters/GetAlias": lambda b: adapters_pb2.GetAliasRequest(alias=b.alias),
            "/capo.v1.Adapters/SetAlias": lambda b: adapters_pb2.SetAliasRequest(alias="mine", revision=b.revision),
            "/capo.v1.Adapters/RollbackAlias": lambda b: adapters_pb2.RollbackAliasRequest(alias=b.alias),
            "/capo.v1.Adapters/RemoveAlias": lambda b: adapters_pb2.RemoveAliasRequest(alias=b.alias),
        }
        listing = ["/capo.v1.Inference/ListModels", "/capo.v1.Tuning/ListJobs"]
        listing += [f"/capo.v1.Adapters/List{what}" for what in ("Adapters", "Pins", "Aliases")]
        assert {*requests, *listing} == {operation for operation in RULES if operation.startswith("/capo.")}
        for method, request in requests.items():
            told = []
            for belongings in (theirs, MISSING):
                answer = await service.ask(method, umbrella, message=request(belongings).SerializeToString())
                told.append((answer.status, answer.code, without(answer.body, belongings)))
            assert told[0] == told[1], method
            assert told[0][0] != "OK", method
        for method in listing:
            raw = (await service.ask(method, umbrella)).body
            shown = raw if isinstance(raw, bytes) else b""
            assert not [value for value in theirs.values().values() if value.encode() in shown], method


async def test_a_job_of_one_tenant_trains_on_no_file_and_from_no_model_of_another(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        acme, umbrella = bearer(service.key("acme")), bearer(service.key("umbrella"))
        theirs, own = await furnish(service, "acme", acme), await furnish(service, "umbrella", umbrella)
        told = []
        for belongings in (theirs, MISSING):
            for body in (
                {"model": BASE, "training_file": belongings.file},
                {"model": BASE, "training_file": own.file, "validation_file": belongings.file},
                {"model": belongings.model, "training_file": own.file},
                {"model": belongings.revision, "training_file": own.file},
            ):
                answer = await service.ask("POST /v1/fine_tuning/jobs", umbrella, json=body)
                assert 400 <= int(answer.status) < 500, answer
                told.append((answer.status, answer.code, without(answer.body, belongings)))
    assert told[:4] == told[4:]


async def test_an_adapter_of_another_tenant_is_not_unloaded_by_its_name(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        acme, umbrella = bearer(service.key("acme")), bearer(service.key("umbrella"))
        theirs = await furnish(service, "acme", acme)
        told = []
        for belongings in (theirs, MISSING):
            answer = await service.ask("POST /v1/unload_lora_adapter", umbrella, json={"lora_name": belongings.alias})
            told.append((answer.status, answer.code, without(answer.body, belongings)))
        still = await service.ask("GET /v1/aliases/{alias:path}", acme, path=f"/v1/aliases/{theirs.alias}")
    assert told[0] == told[1]
    assert told[0][:2] == (404, "not_found")
    assert still.body["revision"] == theirs.revision


NAME_NOTHING_OF_ANYBODYS = {
    "GET /openapi.json",
    "GET /metrics",
    "POST /v1/files",
    "POST /v1/uploads",
    "POST /v1/fine_tuning/alpha/graders/run",
    "POST /v1/fine_tuning/alpha/graders/validate",
    "POST /v1/load_lora_adapter",
    "POST /v1/webhook_endpoints",
}
NAME_THINGS_IN_THEIR_BODIES = {"POST /v1/fine_tuning/jobs", "POST /v1/unload_lora_adapter"}


def test_every_route_meets_another_tenant_or_names_nothing_that_anybody_has() -> None:
    """Those with a name in their path are asked above, all of them; the lists too."""
    lists = {operation for operation in HTTP_RULES if operation.startswith("GET /v1/")}
    in_paths = {operation for operation in HTTP_RULES if "{" in operation}
    public = {operation for operation, rule in HTTP_RULES.items() if rule.is_public}
    met = lists | in_paths | set(INFERENCE) | NAME_THINGS_IN_THEIR_BODIES
    assert set(HTTP_RULES) - public - met == NAME_NOTHING_OF_ANYBODYS


async def test_a_jobs_name_carries_its_tenant(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = bearer(service.key("umbrella"))
        own = await furnish(service, "umbrella", key)
        job = service.tuning.jobs.seen_by("umbrella").job(own.job)
        shown = await service.ask("GET /v1/fine_tuning/jobs/{job_id}", key, path=f"/v1/fine_tuning/jobs/{own.job}")
    assert job.reserved_name.startswith(f"ft:{BASE}:umbrella:")
    assert shown.body["organization_id"] == "umbrella"


async def test_an_idempotency_key_of_one_tenant_says_nothing_to_another(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        made = {}
        for tenant in ("acme", "umbrella"):
            key = bearer(service.key(tenant))
            own = await furnish(service, tenant, key)
            answer = await service.ask(
                "POST /v1/fine_tuning/jobs",
                key,
                json={"model": BASE, "training_file": own.file},
                headers={"Idempotency-Key": "the-same"},
            )
            made[tenant] = answer.status, answer.body["id"], answer.body["organization_id"]
    assert made["acme"][0] == made["umbrella"][0] == 200
    assert made["acme"][1] != made["umbrella"][1]
    assert made["umbrella"][2] == "umbrella"


async def test_what_is_shared_is_changed_by_the_services_own_tenant_alone(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        acme, house = bearer(service.key("acme")), bearer(service.key(HOUSE))
        service.publish("common", None, alias="common")
        await service.service.catalog.refresh()
        refused = [
            await service.ask("DELETE /v1/aliases/{alias:path}", acme, path="/v1/aliases/common"),
            await service.ask("DELETE /v1/models/{model:path}", acme, path="/v1/models/common"),
        ]
        allowed = await service.ask("DELETE /v1/models/{model:path}", house, path="/v1/models/common")
    assert [(answer.status, answer.code) for answer in refused] == [(403, "shared_model")] * 2
    assert allowed.status == 200


async def test_a_tenants_own_alias_of_what_all_share_is_deleted_alone(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        shared = service.publish("helper", None)
        acme = bearer(service.key())
        alias = {"path": "/v1/aliases/ours", "json": {"revision": shared.revision}}
        assert (await service.ask("PUT /v1/aliases/{alias}", acme, **alias)).status == 200
        deleted = await service.ask("DELETE /v1/models/{model:path}", acme, path="/v1/models/ours")
        models = (await service.ask("GET /v1/models", acme)).body["data"]
    assert (deleted.status, deleted.code) == (200, None)
    assert [model["id"] for model in models] == [BASE]
    assert service.registry.artifacts() == [shared]


async def test_a_permission_lets_a_tenant_call_the_one_model_it_is_for(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        acme, umbrella = bearer(service.key("acme")), bearer(service.key("umbrella"))
        theirs = await furnish(service, "acme", acme)
        body = {"messages": [{"role": "user", "content": "hello"}]}
        before = await service.ask("POST /v1/chat/completions", umbrella, json=body | {"model": theirs.model})
        granted = await service.ask(
            "POST /v1/fine_tuning/checkpoints/{model:path}/permissions",
            acme,
            path=f"/v1/fine_tuning/checkpoints/{theirs.model}/permissions",
            json={"project_ids": ["umbrella"]},
        )
        after = await service.ask("POST /v1/chat/completions", umbrella, json=body | {"model": theirs.model})
        alias = await service.ask("POST /v1/chat/completions", umbrella, json=body | {"model": theirs.alias})
    assert [answer.status for answer in (before, granted, after, alias)] == [404, 200, 200, 404]


async def test_a_model_that_is_shared_by_permission_is_listed_to_the_keys_that_may_call_it(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        acme, umbrella, third = (bearer(service.key(tenant)) for tenant in ("acme", "umbrella", "third"))
        theirs = await furnish(service, "acme", acme)
        path = f"/v1/fine_tuning/checkpoints/{theirs.model}/permissions"
        grant = "POST /v1/fine_tuning/checkpoints/{model:path}/permissions"
        assert (await service.ask(grant, acme, path=path, json={"project_ids": ["umbrella"]})).status == 200
        for_it = bearer(service.key("umbrella", models=frozenset({theirs.model})))
        for_others = bearer(service.key("umbrella", models=frozenset({BASE, theirs.alias})))
        listed = {
            "its owner": [BASE, theirs.alias, theirs.model],
            "umbrella": [BASE, theirs.model],
            "umbrella, for this one": [theirs.model],
            "umbrella, for others": [BASE],
            "somebody else": [BASE],
        }
        for who, key in zip(listed, (acme, umbrella, for_it, for_others, third), strict=True):
            models = (await service.ask("GET /v1/models", key)).body["data"]
            answer = await service.ask("/capo.v1.Inference/ListModels", key)
            messages = inference_pb2.ListModelsResponse.FromString(answer.body).models
            assert [model["id"] for model in models] == [model.id for model in messages] == listed[who], who
            one = [await service.ask("GET /v1/models/{model:path}", key, path=f"/v1/models/{m['id']}") for m in models]
            assert [answer.body for answer in one] == models


async def test_a_list_of_models_asks_once_for_what_is_shared_and_not_where_nothing_can_be(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        acme, umbrella = bearer(service.key("acme")), bearer(service.key("umbrella"))
        for number in range(20):
            service.publish(f"support-{number}", "acme", alias=f"support-{number}")
        await service.service.catalog.refresh()
        shares = service.service.catalog.shares
        assert isinstance(shares, KeptShares)
        assert (await service.ask("GET /v1/models", acme)).status == 200
        assert shares.num_lists == 0
        assert (await service.ask("GET /v1/models", umbrella)).status == 200
        assert shares.num_lists == 1


async def test_own_models_are_listed_while_the_database_is_away(tmp_path: Path) -> None:
    class Away(KeptShares):
        async def shared_with(self, tenant: str) -> Collection[str]:
            raise UnavailableError("the job store does not answer")

    async with guarded(tmp_path) as service:
        acme, umbrella = bearer(service.key("acme")), bearer(service.key("umbrella"))
        service.publish("theirs", "acme", alias="theirs")
        service.publish("ours", "umbrella", alias="ours")
        await service.service.catalog.refresh()
        service.service.catalog.shares = Away(service.tuning.permissions)
        listed = {key: (await service.ask("GET /v1/models", key)).body["data"] for key in (acme, umbrella)}
    assert [[model["id"] for model in models] for models in listed.values()] == [[BASE, "theirs"], [BASE, "ours"]]


async def test_a_model_that_is_shared_by_permission_is_pinned_by_its_owner_alone(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        acme, umbrella = bearer(service.key("acme")), bearer(service.key("umbrella"))
        theirs = await furnish(service, "acme", acme)
        path = f"/v1/fine_tuning/checkpoints/{theirs.model}/permissions"
        grant = "POST /v1/fine_tuning/checkpoints/{model:path}/permissions"
        assert (await service.ask(grant, acme, path=path, json={"project_ids": ["umbrella"]})).status == 200
        pin, path = "PUT /v1/adapters/{reference:path}/pin", f"/v1/adapters/{theirs.model}/pin"
        unpin = "DELETE /v1/adapters/{reference:path}/pin"
        refused = await service.ask(pin, umbrella, path=path)
        message = adapters_pb2.PinAdapterRequest(reference=theirs.model).SerializeToString()
        called = await service.ask("/capo.v1.Adapters/PinAdapter", umbrella, message=message)
        assert [(answer.status, answer.code) for answer in (refused, called)] == [
            (403, "not_the_owner"),
            ("PERMISSION_DENIED", "not_the_owner"),
        ]
        assert service.service.pins.all() == []
        assert (await service.ask(pin, acme, path=path)).status == 200
        assert (await service.ask(unpin, umbrella, path=path)).status == 404
        assert (await service.ask(unpin, acme, path=path)).status == 200


async def test_what_all_share_is_pinned_and_unpinned_by_the_house_alone(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        acme, house = bearer(service.key("acme")), bearer(service.key(HOUSE))
        service.publish("common", None, alias="common")
        await service.service.catalog.refresh()
        path = "/v1/adapters/common/pin"
        pin, unpin = "PUT /v1/adapters/{reference:path}/pin", "DELETE /v1/adapters/{reference:path}/pin"
        assert (await service.ask(pin, house, path=path)).status == 200
        refused = [await service.ask(operation, acme, path=path) for operation in (pin, unpin)]
        assert [(answer.status, answer.code) for answer in refused] == [(403, "shared_model")] * 2
        assert [each["reference"] for each in (await service.ask("GET /v1/pins", acme)).body["data"]] == ["common"]
        assert (await service.ask("PUT /v1/aliases/{alias}", acme, path="/v1/aliases/mine", json={
            "revision": service.registry.alias("common").revision
        })).status == 200  # fmt: skip
        assert (await service.ask(pin, acme, path="/v1/adapters/mine/pin")).status == 200, "its own name for it"
        assert (await service.ask(unpin, house, path=path)).status == 200


async def test_a_job_for_an_alias_that_all_share_is_refused_before_it_trains_for_nothing(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        service.publish("common", None, alias="common")
        statuses = {}
        for tenant in ("acme", HOUSE):
            key = bearer(service.key(tenant))
            form = {"files": {"file": ("rows.jsonl", chat_rows(12))}, "data": {"purpose": "fine-tune"}}
            file = await service.ask("POST /v1/files", key, **form)
            body = {"model": BASE, "training_file": file.body["id"], "capo": {"alias": "common"}}
            answer = await service.ask("POST /v1/fine_tuning/jobs", key, json=body)
            statuses[tenant] = (answer.status, answer.code)
        assert statuses == {"acme": (400, "alias_taken"), HOUSE: (200, None)}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_a_key_may_be_for_some_models_only(tmp_path: Path, protocol: str) -> None:
    async with guarded(tmp_path) as service:
        service.publish("common", None, alias="common")
        service.publish("other", None, alias="other")
        await service.service.catalog.refresh()
        key = bearer(service.key(models=frozenset({"common"})))
        told = {}
        for model in ("common", "other", BASE, "nobodys"):
            if protocol == "http":
                body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
                told[model] = await service.ask("POST /v1/chat/completions", key, json=body)
            else:
                message = inference_pb2.Message(role="user", content="hello")
                request = inference_pb2.ChatRequest(model=model, messages=[message])
                told[model] = await service.ask("/capo.v1.Inference/Chat", key, message=request.SerializeToString())
        listed = await service.ask("GET /v1/models", key)
        shown = {
            model: await service.ask("GET /v1/models/{model:path}", key, path=f"/v1/models/{model}") for model in told
        }
    assert shown.pop("common").status == 200
    assert {answer.code for answer in shown.values()} == {"model_not_allowed"}
    assert told.pop("common").status in (200, "OK")
    assert {answer.code for answer in told.values()} == {"model_not_allowed"}
    assert [model["id"] for model in listed.body["data"]] == ["common"]


async def test_each_tenant_has_a_prefix_cache_of_its_own_and_without_keys_there_is_one(tmp_path: Path) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
    async with guarded(tmp_path) as service:
        salts = []
        original = service.engine.complete

        async def complete(call: Any) -> bytes:
            salts.append(call.body.get("cache_salt"))
            return await original(call)

        service.engine.complete = complete  # type: ignore[method-assign]
        await service.ask("POST /v1/chat/completions", None, json=body)
        keys = [service.key(tenant, frozenset({Scope.INFER})) for tenant in ("acme", "acme", "umbrella")]
        for key in keys:
            await service.ask("POST /v1/chat/completions", bearer(key), json=body)
        chosen = await service.ask("POST /v1/chat/completions", bearer(keys[2]), json=body | {"cache_salt": salts[1]})
    assert salts[0] is None
    assert salts[1] == salts[2] != salts[3]
    assert len(salts) == 4
    assert chosen.status == 400, "a client cannot choose its salt"
