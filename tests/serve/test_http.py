"""The HTTP face on a real socket: names, refusals, honest streams, cancellation, drain."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry import Registry
from tests.serve.fake_engine import FakeEngine
from tests.serve.running import BASE, eventually, publish, running_service

HELLO = [{"role": "user", "content": "hello"}]


async def ask(client: httpx.AsyncClient, model: str, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"model": model, "messages": HELLO, **fields})


def text_of(response: httpx.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]


async def events_of(client: httpx.AsyncClient, model: str) -> list[str]:
    """The payloads of a streamed answer's events."""
    body = {"model": model, "messages": HELLO, "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        return [line.removeprefix("data: ") async for line in response.aiter_lines() if line]


async def test_a_model_answers_by_alias_revision_digest_prefix_and_fine_tuned_name(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    ft = "ft:capo-tiny:capo:support:abcd1234"
    artifact = publish(registry, "support", alias="help", fine_tuned_name=ft)
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        for name in ("help", artifact.revision, f"support@{artifact.digest[:9]}", f"support@{artifact.digest}", ft):
            response = await ask(client, name)
            assert response.status_code == 200, response.text
            assert text_of(response).startswith(artifact.revision)
        assert text_of(await ask(client, BASE)).startswith("base")


async def test_an_answer_names_the_exact_revision_that_an_alias_meant(tmp_path: Path) -> None:
    ft = "ft:capo-tiny:capo::abcd1234"
    artifact = publish(Registry(tmp_path), "support", alias="support", fine_tuned_name=ft)
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        assert (await ask(client, "support")).json()["model"] == artifact.revision
        assert (await ask(client, ft)).json()["model"] == ft


async def test_an_adapter_published_by_another_process_is_callable_at_once(tmp_path: Path) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, service):
        service.catalog._poll_seconds = 3600  # the watcher is out of the game; the request itself must look
        await asyncio.sleep(0.1)
        for number in range(20):
            artifact = await asyncio.to_thread(publish, Registry(tmp_path), f"adapter{number}")
            assert (await ask(client, artifact.revision)).status_code == 200


@pytest.mark.parametrize("name", ["nope", "nope@12345678", "../etc/passwd", "ft:x", "a" * 5000, "", "nöpe", "base"])
async def test_an_unknown_model_is_a_404_in_openais_shape(tmp_path: Path, name: str) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        response = await ask(client, name)
        assert response.status_code == (400 if name == "" else 404)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == "model"
        if name:
            assert error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": HELLO}, "model"),
        ({"model": BASE, "messages": HELLO, "temprature": 1}, "temprature"),
        ({"model": BASE, "messages": HELLO, "priority": 9}, "priority"),
        ({"model": BASE, "messages": HELLO, "cache_salt": "x"}, "cache_salt"),
        ({"model": BASE, "messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"model": BASE, "messages": HELLO, "kv_transfer_params": {}}, "kv_transfer_params"),
        ({"model": BASE, "messages": HELLO, "n": 100000}, "n"),
        ({"model": BASE, "messages": HELLO, "n": "5000"}, "n"),
        ({"model": BASE, "messages": HELLO, "n": 5000.0}, "n"),
        ({"model": BASE, "messages": HELLO, "stream": "false"}, "stream"),
        ({"model": BASE, "messages": HELLO, "stop": ["x"] * 100}, "stop"),
        ({"model": BASE, "messages": HELLO, "store": True}, "store"),
        ({"model": BASE, "messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
async def test_a_field_that_is_not_honoured_is_refused_by_name(
    tmp_path: Path, body: dict[str, Any], param: str
) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000])
async def test_a_body_that_is_no_json_object_is_a_400(tmp_path: Path, raw: bytes) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        response = await client.post("/v1/chat/completions", content=raw)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_json"


async def test_a_body_over_the_limit_is_a_413(tmp_path: Path) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        for content_type in ("application/json", "multipart/form-data; boundary=x"):
            response = await client.post(
                "/v1/chat/completions", content=b" " * (9 * 1024 * 1024), headers={"content-type": content_type}
            )
            assert response.status_code == 413


async def test_unknown_routes_and_methods_answer_in_openais_shape(tmp_path: Path) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
            response = await client.request(method, path)
            assert response.status_code == status
            assert "message" in response.json()["error"]


async def test_vllms_own_routes_do_not_exist(tmp_path: Path) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        for path in ("/invocations", "/v1/embeddings", "/load", "/adapters", "/docs", "/sleep"):
            assert (await client.post(path, json={})).status_code == 404


async def test_a_stream_that_ends_well_ends_with_done(tmp_path: Path) -> None:
    async with running_service(FakeEngine(num_tokens=3), tmp_path) as (client, _):
        events = await events_of(client, BASE)
        assert events[-1] == "[DONE]"
        assert len(events) == 4


async def test_a_stream_cut_by_the_engines_death_ends_with_an_error_and_without_done(tmp_path: Path) -> None:
    engine = FakeEngine(num_tokens=5)
    async with running_service(engine, tmp_path) as (client, _):
        engine.fail_after_tokens = 2
        events = await events_of(client, BASE)
        assert len(events) == 3
        assert json.loads(events[-1])["error"]["code"] == "engine_dead"


async def test_what_fails_before_the_first_token_has_a_real_status(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running_service(engine, tmp_path) as (client, _):
        engine.fail_after_tokens = 0
        response = await ask(client, BASE, stream=True)
        assert response.status_code == 503
        assert response.headers["retry-after"]


async def test_a_client_that_leaves_frees_its_adapter(tmp_path: Path) -> None:
    engine = FakeEngine(num_tokens=1000)
    artifact = publish(Registry(tmp_path), "support")
    async with running_service(engine, tmp_path) as (client, service):
        engine.answer_gate.clear()
        for stream in (True, False):
            with pytest.raises(httpx.ReadTimeout):
                await client.post(
                    "/v1/chat/completions",
                    json={"model": artifact.revision, "messages": HELLO, "stream": stream},
                    timeout=0.2,
                )
        await eventually(lambda: not any(resident.users for resident in service.pool.residents()), seconds=1)


async def test_draining_refuses_new_requests_and_lets_running_streams_finish(tmp_path: Path) -> None:
    engine = FakeEngine(num_tokens=3)
    async with running_service(engine, tmp_path) as (client, service):
        engine.answer_gate.clear()
        running = asyncio.create_task(events_of(client, BASE))
        await asyncio.sleep(0.1)
        drain = asyncio.create_task(service.drain(5))
        await asyncio.sleep(0.05)
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/livez")).status_code == 200
        refused = await ask(client, BASE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        engine.answer_gate.set()
        assert (await running)[-1] == "[DONE]"
        assert await drain == 0


async def test_an_alias_flip_takes_effect_with_its_answer(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    revisions = [publish(registry, "support", content).revision for content in ("one", "two")]
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        for revision in revisions * 3:
            response = await client.put("/v1/aliases/support", json={"revision": revision})
            assert response.status_code == 200
            assert response.json()["revision"] == revision
            assert text_of(await ask(client, "support")).startswith(revision)
        listed = (await client.get("/v1/aliases")).json()["data"]
        assert [(a["alias"], a["revision"]) for a in listed] == [("support", revisions[-1])]


@pytest.mark.parametrize(
    ("alias", "body", "status"),
    [
        ("support", {"revision": "support@0000000000000000"}, 404),
        ("support", {}, 400),
        ("support", {"revision": 7}, 400),
        ("support", {"revision": "x", "force": True}, 400),
        ("Support", {"revision": "x@12345678"}, 400),
        ("..", {"revision": "x@12345678"}, 404),
    ],
)
async def test_a_wrong_alias_request_is_refused(tmp_path: Path, alias: str, body: Any, status: int) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        assert (await client.put(f"/v1/aliases/{alias}", json=body)).status_code == status


async def test_adapters_are_listed_with_state_and_reason(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine()
    good, bad = publish(registry, "good", alias="g"), publish(registry, "bad")
    engine.refuse.add(bad.revision)
    async with running_service(engine, tmp_path) as (client, _):
        states = {a["name"]: a["state"] for a in (await client.get("/v1/adapters")).json()["data"]}
        assert states["bad"] == "available"
        await ask(client, good.revision)
        refused = await ask(client, bad.revision)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "engine_refused")
        listed = {a["name"]: a for a in (await client.get("/v1/adapters")).json()["data"]}
        assert listed["good"]["state"] == "loaded"
        assert listed["good"]["aliases"] == ["g"]
        assert listed["bad"]["state"] == "refused"
        assert listed["bad"]["reason"]["code"] == "engine_refused"


async def test_models_lists_the_base_and_every_alias_with_its_revision(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    ft = "ft:capo-tiny:capo:support:abcd1234"
    artifact = publish(registry, "support", alias="help", fine_tuned_name=ft)
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        models = {m["id"]: m for m in (await client.get("/v1/models")).json()["data"]}
        assert set(models) == {BASE, "help", ft}
        assert models["help"]["revision"] == artifact.revision
        assert (await client.get(f"/v1/models/{ft}")).json()["id"] == ft
        assert (await client.get("/v1/models/nope")).status_code == 404


async def test_every_response_carries_a_request_id(tmp_path: Path) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        own = await client.get("/livez", headers={"x-request-id": "my-id.1"})
        assert own.headers["x-request-id"] == "my-id.1"
        foul = await client.get("/nothing", headers={"x-request-id": "a b\tc"})
        assert foul.headers["x-request-id"].startswith("req-")


async def test_a_removed_adapter_leaves_the_engine_and_is_unknown(tmp_path: Path) -> None:
    registry, engine = Registry(tmp_path), FakeEngine()
    artifact = publish(registry, "support")
    async with running_service(engine, tmp_path) as (client, _):
        assert (await ask(client, artifact.revision)).status_code == 200
        await asyncio.to_thread(registry.remove, artifact.revision)
        await eventually(lambda: not engine.loaded)
        assert (await ask(client, artifact.revision)).status_code == 404


async def test_requests_beyond_a_models_limit_are_a_429_and_beyond_the_services_a_503(tmp_path: Path) -> None:
    engine = FakeEngine()
    artifact = publish(Registry(tmp_path), "support")
    async with running_service(engine, tmp_path, max_in_flight=3, max_in_flight_per_model=2) as (client, service):
        engine.answer_gate.clear()
        running = [asyncio.create_task(ask(client, BASE)) for _ in range(2)]
        await eventually(lambda: service._in_flight == 2)
        refused = await ask(client, BASE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "model_overloaded")
        assert refused.headers["retry-after"] == "1"
        running.append(asyncio.create_task(ask(client, artifact.revision)))
        await eventually(lambda: service._in_flight == 3)
        refused = await ask(client, artifact.revision)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        engine.answer_gate.set()
        assert [(await task).status_code for task in running] == [200] * 3
        assert service._in_flight_of == {}


async def test_responses_stream_an_error_event_and_no_completed_one_when_the_engine_dies(tmp_path: Path) -> None:
    engine = FakeEngine(num_tokens=4)
    engine.fail_after_tokens = 2
    async with running_service(engine, tmp_path) as (client, _):
        body = {"model": BASE, "input": "hello", "stream": True}
        async with client.stream("POST", "/v1/responses", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
    assert lines[-2] == "event: error"
    error = json.loads(lines[-1].removeprefix("data: "))
    assert (error["type"], error["code"], error["sequence_number"]) == ("error", "engine_dead", 2)


async def test_tokens_are_converted_under_any_model_name_and_no_other(tmp_path: Path) -> None:
    ft = "ft:capo-tiny:capo:support:abcd1234"
    artifact = publish(Registry(tmp_path), "support", fine_tuned_name=ft)
    async with running_service(FakeEngine(), tmp_path) as (client, service):
        for model in (BASE, ft, artifact.revision):
            tokens = (await client.post("/tokenize", json={"model": model, "prompt": "ab"})).json()["tokens"]
            back = await client.post("/detokenize", json={"model": model, "tokens": tokens})
            assert back.json()["prompt"] == "ab"
        assert (await client.post("/tokenize", json={"model": "nope", "prompt": "ab"})).status_code == 404
        assert service.engine.loaded == {}  # type: ignore[attr-defined]


async def test_an_unknown_route_names_those_that_exist(tmp_path: Path) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        for path in ("/v1/embeddings", "/v1/images/generations", "/v1/audio/speech", "/v1/moderations"):
            response = await client.post(path, json={"model": BASE})
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "unknown_url"
            assert "/v1/chat/completions" in response.json()["error"]["message"]


async def test_the_openapi_document_describes_bodies_as_the_policy_has_them(tmp_path: Path) -> None:
    async with running_service(FakeEngine(), tmp_path) as (client, _):
        document = (await client.get("/openapi.json")).json()
    assert "422" not in json.dumps(document)
    post = document["paths"]["/v1/chat/completions"]["post"]
    body = post["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    assert body["properties"]["n"]["maximum"] == 16
    assert "cache_salt" not in body["properties"]  # the engine knows it, clients may not send it
    alias = document["paths"]["/v1/aliases/{alias}"]["put"]["requestBody"]["content"]["application/json"]["schema"]
    assert alias["required"] == ["revision"]
