"""Requests beside the usual ones: other methods, a slash too many, probes by HEAD, the health of a service unknown."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from grpc_health.v1 import health_pb2

from capo.access_rules import HTTP_RULES
from capo.app import build_health_app, build_metrics_app
from registry.principal import Scope
from tests.capo.guarded import bearer, guarded
from tests.serve.running import BASE, eventually
from tests.tune.jobs.support import chat_rows

CHECK = "/grpc.health.v1.Health/Check"


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ("GET /v1/chat/completions", "POST"),
        ("POST /v1/models", "GET, HEAD"),
        ("PATCH /v1/models/one", "DELETE, GET, HEAD"),
        ("POST /v1/aliases/one", "DELETE, GET, HEAD, PUT"),
        ("POST /livez", "GET, HEAD"),
    ],
)
async def test_a_method_that_a_path_does_not_have_is_405_and_told_which_it_has(
    tmp_path: Path, asked: str, allowed: str
) -> None:
    async with guarded(tmp_path) as service:
        method, _, path = asked.partition(" ")
        answer = await service.ask(asked, None, path=path)
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allowed
    assert answer.body["error"]["message"] == f"{method} is not allowed on {path}; allowed are {allowed}."


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz"])
async def test_probes_answer_a_head_as_a_get_without_its_body(tmp_path: Path, path: str) -> None:
    async with guarded(tmp_path) as service:
        service.key()
        got, head = await asyncio.gather(service.http.get(path), service.http.head(path))
    assert (head.status_code, head.content) == (200, b"")
    assert [head.headers["content-length"], str(len(got.content))] == [got.headers["content-length"]] * 2


async def test_what_may_be_read_may_be_asked_about_by_head_with_the_same_rights(tmp_path: Path) -> None:
    rows = {"files": {"file": ("rows.jsonl", chat_rows(12))}, "data": {"purpose": "fine-tune"}}
    async with guarded(tmp_path) as service:
        tune, metrics = (
            {"Authorization": bearer(service.key(scopes=frozenset({s})))} for s in (Scope.TUNE, Scope.METRICS)
        )
        file = (await service.http.post("/v1/files", headers=tune, **rows)).json()["id"]
        for path in ("/v1/models", f"/v1/models/{BASE}", f"/v1/files/{file}/content", "/v1/files", "/openapi.json"):
            got, head = [await service.http.request(method, path, headers=tune) for method in ("GET", "HEAD")]
            assert (got.status_code, head.status_code, head.content) == (200, 200, b""), path
            for name in ("content-length", "content-type"):
                assert head.headers.get(name) == got.headers.get(name), (path, name)
            assert (await service.http.head(path)).status_code == 401, path
        assert [(await service.http.head("/metrics", headers=key)).status_code for key in (metrics, tune)] == [200, 403]
        absent = await service.http.head("/v1/files/file-nothing", headers=tune)
        wrong = await service.http.head("/v1/chat/completions", headers=tune)
    assert (absent.status_code, absent.content) == (404, b"")
    assert (wrong.status_code, wrong.headers["allow"], wrong.content) == (405, "POST", b"")


async def test_readiness_by_head_is_503_while_there_is_no_readiness(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        await service.service.drain(1)
        head = await service.http.head("/readyz")
    assert (head.status_code, head.content) == (503, b"")


async def test_models_are_listed_with_a_slash_at_the_end_too(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = {"Authorization": bearer(service.key())}
        plain, slash = [await service.http.get(path, headers=key) for path in ("/v1/models", "/v1/models/")]
        without_a_key: httpx.Response = await service.http.get("/v1/models/")
    assert [model["id"] for model in plain.json()["data"]] == [BASE]
    assert slash.json() == plain.json()
    assert without_a_key.status_code == 401


async def test_nobody_is_sent_elsewhere_for_a_slash_too_many(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        service.key()
        for path in ("/v1/files/", "/v1/chat/completions/", "/metrics/", "/livez/", "/openapi.json/"):
            for method in ("GET", "POST"):
                answer = await service.ask(f"{method} {path}", None, headers={"Host": "evil.example"})
                assert (answer.status, answer.code) == (404, "unknown_url")
                assert "location" not in answer.headers


def test_no_path_that_is_offered_ends_with_a_slash(tmp_path: Path) -> None:
    assert [operation for operation in HTTP_RULES if operation.endswith("/")] == []


async def test_ports_of_their_own_send_nobody_elsewhere_either(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        for app in (build_health_app(lambda: None, service.door), build_metrics_app(service.door)):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://evil.example") as client:
                for path in ("/livez/", "/metrics/"):
                    answer = await client.get(path)
                    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


async def test_the_health_of_an_unknown_service_is_not_found_and_counted_so(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:

        def counted(code: str) -> float | None:
            return service.metrics.get_sample_value("capo_request_errors_total", {"protocol": "grpc", "code": code})

        message = health_pb2.HealthCheckRequest(service="nope").SerializeToString()
        assert (await service.ask(CHECK, None, message=message)).status == "NOT_FOUND"
        await eventually(lambda: counted("not_found") == 1)
        assert counted("internal_error") is None
