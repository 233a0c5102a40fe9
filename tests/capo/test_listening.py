"""Where a service listens and to whom: TLS, other machines, web pages, and a metrics port of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from capo.access import is_loopback
from capo.keys.records import NewKey
from capo.keys.store import KeyStore
from capo.server import server_address
from capo.settings import Settings
from capo.tls import Tls
from registry import errors
from registry.principal import Scope
from tests.capo.certificates import Authority, Pair
from tests.capo.guarded import Guarded, bearer, guarded
from tests.ports import free_port
from tune.jobs.database import Database, sqlite_url

EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 - that nothing listens there by mistake is what is tested


def trusting(authority: Authority, own: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.path)
    if own is not None:
        context.load_cert_chain(own.certificate, own.key)
    return context


async def http_status(service: Guarded, context: ssl.SSLContext, scheme: str = "https") -> int | str:
    async with httpx.AsyncClient(verify=context, trust_env=False) as client:
        try:
            return (await client.get(f"{scheme}://127.0.0.1:{service.port}/livez")).status_code
        except httpx.TransportError as error:
            return type(error).__name__


async def grpc_code(service: Guarded, authority: Authority, own: Pair | None = None) -> str:
    key, certificate = (None, None) if own is None else (own.key.read_bytes(), own.certificate.read_bytes())
    credentials = grpc.ssl_channel_credentials(authority.path.read_bytes(), key, certificate)
    async with grpc.aio.secure_channel(f"127.0.0.1:{service.grpc_port}", credentials) as channel:
        try:
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=3)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
    return "OK"


async def test_with_a_certificate_both_faces_speak_tls_and_nothing_else(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server = authority.pair("server")
    stranger = Authority(tmp_path, "stranger")
    async with guarded(tmp_path, tls=Tls(server.certificate, server.key, None)) as service:
        assert await http_status(service, trusting(authority)) == 200
        assert await http_status(service, trusting(stranger)) == "ConnectError"
        assert await http_status(service, trusting(authority), scheme="http") != 200
        assert await grpc_code(service, authority) == "OK"
        assert await grpc_code(service, stranger) == "UNAVAILABLE"
        with pytest.raises(grpc.aio.AioRpcError):
            await service.channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=3)


async def test_with_a_client_authority_only_clients_with_its_certificates_come_in(tmp_path: Path) -> None:
    authority, clients, strangers = (
        Authority(tmp_path),
        Authority(tmp_path, "clients"),
        Authority(tmp_path, "strangers"),
    )
    server = authority.pair("server")
    async with guarded(tmp_path, tls=Tls(server.certificate, server.key, clients.path)) as service:
        own, foreign = clients.pair("own"), strangers.pair("foreign")
        assert await http_status(service, trusting(authority, own)) == 200
        assert await grpc_code(service, authority, own) == "OK"
        for shown in (None, foreign):
            assert await http_status(service, trusting(authority, shown)) in ("ConnectError", "ReadError")
            assert await grpc_code(service, authority, shown) == "UNAVAILABLE"


def test_health_is_asked_without_a_certificate_also_where_clients_must_show_one(tmp_path: Path) -> None:
    """As a kubelet and the image's own health check ask."""
    authority = Authority(tmp_path)
    server = authority.pair("server")
    tls = {"tls_certificate": server.certificate, "tls_key": server.key, "tls_client_ca": authority.path}
    health_port = str(free_port())
    settings = {name: str(value) for name, value in tls.items()}
    health_check = Path(__file__).parents[2] / "deploy/container/healthcheck.py"

    def health_check_ends(port: str) -> int:
        environment = os.environ | {"CAPO_HEALTH_PORT": port}
        return subprocess.run([sys.executable, health_check], env=environment, stderr=subprocess.DEVNULL).returncode

    with control_process(tmp_path, health_port=health_port, **settings) as (url, process):
        probes = f"http://127.0.0.1:{health_port}"
        ready(probes, process)
        answers = {path: httpx.get(probes + path, trust_env=False) for path in ("/startupz", "/livez", "/readyz")}
        assert {answer.status_code for answer in answers.values()} == {200}
        assert httpx.get(f"{probes}/v1/models", trust_env=False).status_code == 404
        assert httpx.get(f"{probes}/metrics", trust_env=False).status_code == 404
        assert health_check_ends(health_port) == 0
        port = url.rpartition(":")[2]
        assert health_check_ends(port) == 1, "the API itself lets nobody in without a certificate"


def test_tls_files_that_are_no_pair_are_refused_at_the_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, other = authority.pair("one"), authority.pair("other")
    cases: list[dict[str, Any]] = [
        {"tls_certificate": one.certificate, "tls_key": other.key},
        {"tls_certificate": tmp_path / "none.pem", "tls_key": one.key},
        {"tls_certificate": one.certificate, "tls_key": one.key, "tls_client_ca": one.key},
    ]
    for case in cases:
        with pytest.raises(errors.InvalidRequestError, match="TLS files"):
            Tls.of(Settings(**case))
    for half in ({"tls_key": one.key}, {"tls_certificate": one.certificate}, {"tls_client_ca": authority.path}):
        with pytest.raises(ValueError, match="tls_"):
            Settings(**half)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "localhost"])
def test_the_address_that_is_told_is_one_that_clients_can_read(host: str) -> None:
    told = httpx.URL(f"http://{server_address(host, 8123)}")
    assert (told.host, told.port) == (host, 8123)


@pytest.mark.parametrize(
    ("host", "is_only_this_machine"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), (EVERY_ADDRESS, False),
     ("::", False), ("10.1.2.3", False), ("example.com", False), ("127.0.0.1.example.com", False), ("", False)],
)  # fmt: skip
def test_what_counts_as_this_machine(host: str, is_only_this_machine: bool) -> None:
    assert is_loopback(host) is is_only_this_machine


FOREIGN: tuple[dict[str, str], ...] = (
    {"Host": "evil.example"}, {"Host": "evil.example:80"}, {"Host": "127.0.0.1.evil.example"}, {"Host": ""},
    {"Host": "x/v1/models?"}, {"Origin": "https://evil.example"}, {"Origin": "null"},
)  # fmt: skip


async def test_an_open_service_answers_no_web_page_of_another_site(tmp_path: Path) -> None:
    """DNS rebinding gives itself away by Host, a request across sites by Origin."""
    local = {"Host": "localhost", "Origin": "http://localhost:3000"}
    async with guarded(tmp_path) as service:
        for headers in FOREIGN:
            for path in ("/v1/models", "/v1/files"):
                answer = await service.ask(f"GET {path}", None, headers=headers)
                assert (answer.status, answer.code) == (403, "foreign_origin"), headers
                assert "access-control-allow-origin" not in answer.headers
        assert (await service.ask("GET /v1/files", None, headers=local)).status == 200
        service.key()
        assert {(await service.ask("GET /v1/files", None, headers=headers)).status for headers in FOREIGN} == {401}


@contextlib.contextmanager
def control_process(tmp_path: Path, *options: str, **settings: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """``capo serve --role control``: all but the engine, in a second or two. Yields its address."""
    port = free_port()
    environment = os.environ | {f"CAPO_{name.upper()}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "capo", "serve", "--role", "control", "--port", str(port), "--grpc-port", "0"]
    with (tmp_path / "service.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--data-dir", str(tmp_path), *options],
            env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            process.kill()


def ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    process.kill()
    pytest.fail("the service was not ready in time")


def test_a_service_without_keys_refuses_to_listen_to_other_machines_unless_told_to(tmp_path: Path) -> None:
    with control_process(tmp_path, "--host", EVERY_ADDRESS) as (_, process):
        assert process.wait(40) == 2
    said = (tmp_path / "service.log").read_text()
    assert "--allow-unauthenticated" in said
    assert "capo keys" in said


def test_a_running_service_with_keys_listens_to_all_and_has_its_metrics_on_their_own_port(tmp_path: Path) -> None:
    store = KeyStore(Database(sqlite_url(tmp_path / "jobs.sqlite")))
    metrics, infer = (
        bearer(store.create(NewKey("capo", frozenset({scope})))) for scope in (Scope.METRICS, Scope.INFER)
    )
    metrics_port = free_port()
    with control_process(tmp_path, "--host", EVERY_ADDRESS, metrics_port=str(metrics_port)) as (url, process):
        ready(url, process)
        page = f"http://127.0.0.1:{metrics_port}/metrics"

        def status(address: str, key: str | None) -> int:
            headers = {} if key is None else {"Authorization": key}
            return httpx.get(address, headers=headers, trust_env=False).status_code

        assert status(f"{url}/v1/models", None) == 401
        assert status(f"{url}/v1/models", infer) == 200
        assert [status(page, key) for key in (None, infer, metrics)] == [401, 403, 200]
        assert status(f"{url}/metrics", metrics) == 404, "it is on its own port alone"
        assert status(f"http://127.0.0.1:{metrics_port}/v1/models", infer) == 404
