"""Keys: what is stored of them, how they end, and what they may use."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from capo.cli import keys
from capo.client import AsyncCapoClient, AuthenticationError
from capo.keys.quota import Bound, Quota
from capo.keys.records import KeyLimits, NewKey
from capo.keys.ring import KeyRing
from capo.keys.secret import new_secret, read_secret
from capo.keys.store import KeyStore
from capo_proto.v1 import inference_pb2
from registry import errors
from registry.principal import Scope
from tests.capo.guarded import EVERY_SCOPE, Guarded, bearer, guarded, within
from tests.serve.running import BASE, eventually
from tune.jobs.database import Database, sqlite_url

CHAT = "POST /v1/chat/completions"
HELLO = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(Database(sqlite_url(tmp_path / "jobs.sqlite")))


def ring_of(store: KeyStore) -> KeyRing:
    ring = KeyRing(store)
    ring.read()
    return ring


def capo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "capo", *arguments], capture_output=True, text=True, check=False)


# -- what a key is -----------------------------------------------------------------------------------------------


def test_a_secret_has_32_random_bytes_and_an_id_that_is_not_part_of_them() -> None:
    made = [new_secret() for _ in range(200)]
    assert len({secret.text for secret in made}) == len({secret.key_id for secret in made}) == 200
    for secret in made:
        prefix, key_id, text = secret.text.split("_", 2)
        assert (prefix, key_id) == ("capo", secret.key_id)
        assert len(text) == 43, "32 bytes in base64url"
        assert read_secret(secret.text) == secret
        assert text not in repr(secret)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "capo",
        "capo__",
        "sk-123",
        "capo_0123456789ab_short",
        "capo_ZZZ_" + "a" * 43,
        "capo_0123456789ab_" + "é" * 43,
    ],
)
def test_what_cannot_be_a_key_is_none(text: str, store: KeyStore) -> None:
    assert read_secret(text) is None
    with pytest.raises(errors.AuthenticationError):
        ring_of(store).find(text)


def test_nothing_on_disk_holds_a_secret(tmp_path: Path, store: KeyStore) -> None:
    secrets = [store.create(NewKey("acme", EVERY_SCOPE)) for _ in range(3)]
    secrets.append(store.rotate(secrets[0].key_id, grace_seconds=60))
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in secrets:
        assert secret.text.encode() not in kept
        assert secret.text.split("_", 2)[2].encode() not in kept
        assert secret.digest.encode() in kept


def test_a_key_for_nothing_or_of_the_past_is_not_made(store: KeyStore) -> None:
    for new in (NewKey("acme", frozenset()), NewKey("acme", EVERY_SCOPE, expires_at=1), NewKey("../x", EVERY_SCOPE)):
        with pytest.raises(errors.InvalidRequestError):
            store.create(new)
    assert store.all() == []


def test_a_rotated_key_has_two_good_secrets_for_a_while_and_then_one(store: KeyStore) -> None:
    now = 1_800_000_000.0
    ring = KeyRing(store, clock=lambda: now)
    timed = KeyStore(store._database, clock=lambda: now)
    first = timed.create(NewKey("acme", EVERY_SCOPE))
    second = timed.rotate(first.key_id, grace_seconds=60)
    ring.read()
    assert ring.find(first.text) == ring.find(second.text)
    now += 61
    with pytest.raises(errors.AuthenticationError):
        ring.find(first.text)
    assert ring.find(second.text).id == first.key_id


def test_a_secret_that_was_promised_more_time_is_ended_by_a_second_rotation_only_where_that_says_so(
    store: KeyStore,
) -> None:
    now = 1_800_000_000.0
    ring = KeyRing(store, clock=lambda: now)
    timed = KeyStore(store._database, clock=lambda: now)
    first = timed.create(NewKey("acme", EVERY_SCOPE))
    second = timed.rotate(first.key_id, grace_seconds=60)
    with pytest.raises(errors.ConflictError, match="60 seconds yet"):
        timed.rotate(first.key_id, grace_seconds=60)
    ring.read()
    assert ring.find(first.text) == ring.find(second.text)
    third = timed.rotate(first.key_id, grace_seconds=0)
    ring.read()
    assert ring.find(third.text).id == first.key_id
    for ended in (first, second):
        with pytest.raises(errors.AuthenticationError):
            ring.find(ended.text)
    fourth = timed.rotate(first.key_id, grace_seconds=60)
    now += 60
    timed.rotate(first.key_id, grace_seconds=60)
    ring.read()
    assert ring.find(fourth.text).id == first.key_id


@pytest.mark.parametrize("name", ["nope nope", "", "../etc/passwd", "support@xyz", "ft:a:b", "Support!"])
def test_a_key_for_a_model_that_no_model_can_be_called_is_not_made(store: KeyStore, name: str) -> None:
    with pytest.raises(errors.InvalidNameError):
        store.create(NewKey("acme", EVERY_SCOPE, models=frozenset({"support", name})))
    assert store.all() == []


@pytest.mark.parametrize(
    "name", ["support", "support@0123456789abcdef", "ft:capo-tiny:acme:care:a1B2c3", BASE, "Qwen/Qwen3-0.6B"]
)
def test_a_key_may_be_for_whatever_a_model_can_be_called(store: KeyStore, name: str) -> None:
    secret = store.create(NewKey("acme", EVERY_SCOPE, models=frozenset({name})))
    assert ring_of(store).find(secret.text).models == {name}


def test_revoking_ends_both_secrets_and_a_revoked_key_cannot_be_rotated(store: KeyStore) -> None:
    first = store.create(NewKey("acme", EVERY_SCOPE))
    second = store.rotate(first.key_id, grace_seconds=60)
    store.revoke(first.key_id)
    store.revoke(first.key_id)
    ring = ring_of(store)
    for secret in (first, second):
        with pytest.raises(errors.AuthenticationError):
            ring.find(secret.text)
    with pytest.raises(errors.ConflictError):
        store.rotate(first.key_id, grace_seconds=60)
    assert not ring.is_empty, "the door does not open again when the last key is revoked"
    with pytest.raises(errors.NotFoundError):
        store.revoke("000000000000")


def test_how_long_a_refusal_takes_says_nothing_about_the_key(store: KeyStore) -> None:
    """What differs is the comparison of two digests: the secret itself is never compared byte by byte."""
    right = store.create(NewKey("acme", EVERY_SCOPE))
    ring = ring_of(store)
    wrong_at_once = right.text[:18] + ("A" if right.text[18] != "A" else "B") + right.text[19:]
    wrong_at_last = right.text[:-1] + ("A" if right.text[-1] != "A" else "B")
    shown = {"first": wrong_at_once, "last": wrong_at_last, "unknown id": new_secret().text}
    seconds: dict[str, list[float]] = {name: [] for name in shown}
    for _ in range(3000):
        for name, text in shown.items():
            began = time.perf_counter()
            with pytest.raises(errors.AuthenticationError):
                ring.find(text)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    assert max(medians.values()) - min(medians.values()) < 1e-6, medians


def test_a_store_that_is_suddenly_empty_does_not_open_the_door(store: KeyStore) -> None:
    secret = store.create(NewKey("acme", EVERY_SCOPE))
    ring = ring_of(store)
    with store._database.write() as connection:
        connection.exec_driver_sql("DELETE FROM keys")
    ring.read()
    assert not ring.is_empty
    with pytest.raises(errors.AuthenticationError):
        ring.find(secret.text)


# -- the database is away ----------------------------------------------------------------------------------------


async def test_while_the_database_is_away_nobody_new_comes_in_and_nobody_is_shut_out(tmp_path: Path) -> None:
    class Away(KeyStore):
        is_away = False

        def all(self):  # type: ignore[no-untyped-def]
            if self.is_away:
                raise errors.UnavailableError("the job store does not answer")
            return super().all()

    store = Away(Database(sqlite_url(tmp_path / "jobs.sqlite")))
    ring = KeyRing(store)
    ring.read()
    assert ring.is_empty, "no key yet: open"
    following = asyncio.create_task(ring.follow())
    try:
        known = store.create(NewKey("acme", EVERY_SCOPE))
        await eventually(lambda: not ring.is_empty, seconds=3)
        store.is_away = True
        unknown = store.create(NewKey("acme", EVERY_SCOPE))
        await asyncio.sleep(1.3)
        assert ring.find(known.text).id == known.key_id
        assert not ring.is_empty, "the door stays shut"
        with pytest.raises(errors.AuthenticationError):
            ring.find(unknown.text)
        store.is_away = False
        store.revoke(known.key_id)
        await eventually(lambda: ring.read_at > time.monotonic() - 0.5, seconds=3)
        assert ring.find(unknown.text).id == unknown.key_id
        with pytest.raises(errors.AuthenticationError):
            ring.find(known.text)
    finally:
        following.cancel()


async def test_a_revocation_is_followed_while_every_thread_of_asyncios_own_is_busy(tmp_path: Path) -> None:
    store = KeyStore(Database(sqlite_url(tmp_path / "jobs.sqlite")))
    known = store.create(NewKey("acme", EVERY_SCOPE))
    ring = ring_of(store)
    is_over = threading.Event()
    busy = [asyncio.create_task(asyncio.to_thread(is_over.wait, 30)) for _ in range(40)]
    following = asyncio.create_task(ring.follow())
    try:
        store.revoke(known.key_id)
        await eventually(lambda: ring._keys[known.key_id].refusal(time.time()) is not None, seconds=5)
    finally:
        is_over.set()
        following.cancel()
        await asyncio.gather(*busy)


async def test_a_bug_while_the_keys_are_read_is_logged_and_they_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("capo.keys.ring.REFRESH_SECONDS", 0.01)
    store = KeyStore(Database(sqlite_url(tmp_path / "jobs.sqlite")))
    known = store.create(NewKey("acme", EVERY_SCOPE))
    ring = ring_of(store)
    following = asyncio.create_task(ring.follow())
    try:
        with monkeypatch.context() as broken:
            broken.setattr(store, "all", lambda: [][1])
            await eventually(lambda: "list index out of range" in caplog.text)
        store.revoke(known.key_id)
        await eventually(lambda: ring._keys[known.key_id].refusal(time.time()) is not None)
    finally:
        following.cancel()


# -- limits ------------------------------------------------------------------------------------------------------


def test_requests_a_minute_are_a_bucket_that_fills_evenly() -> None:
    now = 0.0
    quota = Quota(KeyLimits(requests_per_minute=6), clock=lambda: now)
    assert [quota.enter() for _ in range(7)] == [None] * 6 + [Bound.REQUESTS]
    assert quota.refusal(Bound.REQUESTS).retry_after_seconds == 10
    now += 10
    assert [quota.enter(), quota.enter()] == [None, Bound.REQUESTS]


def test_tokens_a_minute_are_taken_when_they_are_known_and_may_overdraw_once() -> None:
    now = 0.0
    quota = Quota(KeyLimits(tokens_per_minute=60), clock=lambda: now)
    assert quota.enter() is None
    quota.leave(90)
    assert quota.enter() is Bound.TOKENS
    assert quota.refusal(Bound.TOKENS).retry_after_seconds == 31
    now += 31
    assert quota.enter() is None


async def test_beyond_a_keys_requests_both_faces_answer_as_openai_does(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = bearer(service.key(limits=KeyLimits(requests_per_minute=2)))
        first = await service.ask("GET /v1/models", key)
        await service.ask("GET /v1/models", key)
        refused = await service.ask("GET /v1/models", key)
        called = await service.ask("/capo.v1.Inference/ListModels", key)
        other = await service.ask("GET /v1/models", bearer(service.key()))
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    assert (refused.status, refused.code, refused.body["error"]["type"]) == (
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
    )
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert (called.status, called.code) == ("RESOURCE_EXHAUSTED", "rate_limit_exceeded")
    assert int(called.headers["retry-after"]) >= 1
    assert other.status == 200
    for protocol in ("http", "grpc"):
        assert counted(service, "capo_request_errors_total", protocol=protocol, code="rate_limit_exceeded") == 1
    assert counted(service, "capo_access_refusals_total", reason="requests_per_minute", protocol="http") == 1
    assert counted(service, "capo_access_refusals_total", reason="requests_per_minute", protocol="grpc") == 1


@pytest.mark.parametrize("is_stream", [False, True])
async def test_tokens_are_counted_from_what_the_engine_really_made(tmp_path: Path, is_stream: bool) -> None:
    async with guarded(tmp_path) as service:
        secret = service.key(limits=KeyLimits(tokens_per_minute=5))
        answered = await service.ask(CHAT, bearer(secret), json=HELLO | {"stream": is_stream})
        refused = await service.ask(CHAT, bearer(secret), json=HELLO)
        made = counted(service, "capo_key_tokens_total", key=secret.key_id)
    assert answered.status == 200
    assert made == 5, "the fake engine reads one and makes four"
    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert refused.headers["x-ratelimit-limit-tokens"] == "5"
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


async def test_a_keys_concurrency_counts_streams_until_their_end_on_both_faces(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = bearer(service.key(limits=KeyLimits(concurrency=2)))
        service.engine.answer_gate.clear()
        message = inference_pb2.ChatRequest(model=BASE, messages=[inference_pb2.Message(role="user", content="x")])
        running = [
            asyncio.create_task(service.ask(CHAT, key, json=HELLO | {"stream": True})),
            asyncio.create_task(service.ask("/capo.v1.Inference/Chat", key, message=message.SerializeToString())),
        ]
        await eventually(lambda: service.engine.waiting == 2)
        refused = [await service.ask("GET /v1/models", key), await service.ask("/capo.v1.Inference/ListModels", key)]
        service.engine.answer_gate.set()
        assert [answer.status for answer in await asyncio.gather(*running)] == [200, "OK"]

        async def is_free() -> bool:
            return (await service.ask("GET /v1/models", key)).status == 200

        await within(2, is_free)
    assert [answer.status for answer in refused] == [429, "RESOURCE_EXHAUSTED"]


def counted(service: Guarded, name: str, **labels: str) -> float:
    return service.metrics.get_sample_value(name, labels) or 0.0


# -- clients and commands ----------------------------------------------------------------------------------------


async def test_the_stock_sdk_needs_nothing_but_its_api_key(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        good, narrow = service.key(), service.key(scopes=frozenset({Scope.TUNE}))

        def client(key: str) -> openai.AsyncOpenAI:
            return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key=key, max_retries=0)

        async with client(good.text) as sdk:
            answer = await sdk.chat.completions.create(**HELLO)  # type: ignore[call-overload]
            assert answer.choices[0].message.content
        async with client(new_secret().text) as sdk:
            with pytest.raises(openai.AuthenticationError) as unknown:
                await sdk.models.list()
        async with client(narrow.text) as sdk:
            with pytest.raises(openai.PermissionDeniedError) as forbidden:
                await sdk.chat.completions.create(**HELLO)  # type: ignore[call-overload]
    assert unknown.value.code == "invalid_api_key"
    assert unknown.value.response.headers["www-authenticate"] == "Bearer"
    assert forbidden.value.type == "permission_error"


def test_the_commands_make_list_rotate_and_revoke_and_every_act_is_in_the_audit_log(tmp_path: Path) -> None:
    place = ("--data-dir", str(tmp_path))
    made = capo(
        "keys", "create", "--tenant", "acme", "--scope", "infer", "--scope", "tune", "--model", "support",
        "--expires", "90d", "--requests-per-minute", "60", "--tokens-per-minute", "6000", "--concurrency", "4", *place,
    )  # fmt: skip
    secret = read_secret(made.stdout.strip())
    assert secret is not None, made.stderr
    rotated = read_secret(capo("keys", "rotate", secret.key_id, "--grace", "1h", *place).stdout.strip())
    assert rotated is not None
    assert rotated.key_id == secret.key_id
    listed = capo("keys", "list", *place).stdout
    assert all(
        part in listed for part in (secret.key_id, "acme", "infer,tune", "support", "60 requests/min", "4 at once")
    )
    assert capo("keys", "revoke", secret.key_id, *place).returncode == 0
    assert "revoked" in capo("keys", "list", *place).stdout
    acts = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [act["operation"] for act in acts] == ["keys create", "keys rotate", "keys revoke"]
    assert {act["target"] for act in acts} == {secret.key_id}
    for text in (listed, (tmp_path / "audit.jsonl").read_text()):
        assert secret.text not in text
        assert rotated.text not in text


def test_where_no_service_writes_there_are_no_keys_and_none_of_it_is_made(tmp_path: Path) -> None:
    mistyped = tmp_path / "capo-dta"
    for arguments in (["list"], ["revoke", "0123456789ab"], ["rotate", "0123456789ab"]):
        done = CliRunner().invoke(keys.app, [*arguments, "--data-dir", str(mistyped)])
        assert isinstance(done.exception, errors.NotFoundError)
        assert str(mistyped) in done.exception.message
    assert not mistyped.exists()


def test_a_key_may_go_into_a_file_for_its_owner_alone_and_is_then_shown_nowhere(tmp_path: Path) -> None:
    output = tmp_path / "first-key"
    command = ("keys", "create", "--scope", "admin", "--data-dir", str(tmp_path), "--output", str(output))
    made = capo(*command)
    secret = read_secret(output.read_text().strip())
    assert secret is not None, made.stderr
    assert output.stat().st_mode & 0o777 == 0o600
    assert secret.key_id in made.stdout
    assert secret.text not in made.stdout + made.stderr
    again = capo(*command)
    assert again.returncode != 0
    assert "no key was made" in " ".join(again.stderr.split())
    assert read_secret(output.read_text().strip()) == secret, "what is there is not written over"
    assert capo("keys", "list", "--data-dir", str(tmp_path)).stdout.count("admin") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "--scope", "root"], "infer, tune, admin, metrics"),
        (["create", "--scope", "infer", "--expires", "soon"], "90d"),
        (["create", "--scope", "infer", "--tenant", "../etc"], "etc"),
        (["revoke", "000000000000"], "no key"),
    ],
)
def test_a_wrong_command_says_what_is_allowed(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = capo("keys", *arguments, "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr


async def test_an_admin_act_is_logged_with_who_what_from_where_and_how_it_ended(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        key = service.key()
        artifact = service.publish("support", "acme")
        path = "/v1/aliases/front"
        asked = {"json": {"revision": artifact.revision}, "path": path, "headers": {"x-request-id": "act-1"}}
        await service.ask("PUT /v1/aliases/{alias:path}", bearer(key), **asked)
        await service.ask("PUT /v1/aliases/{alias:path}", None, **asked)
        await service.ask("/capo.v1.Adapters/RollbackAlias", bearer(key))
        await service.ask("GET /v1/aliases", bearer(key))
        await service.ask(CHAT, bearer(key), json=HELLO)
    log = tmp_path / "audit.jsonl"
    acts = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(act["operation"], act["result"], act["key"]) for act in acts] == [
        ("PUT /v1/aliases/{alias:path}", "200", key.key_id),
        ("PUT /v1/aliases/{alias:path}", "invalid_api_key", None),
        ("/capo.v1.Adapters/RollbackAlias", "invalid_name", key.key_id),
    ]
    assert acts[0]["changes"] == {"alias": "front", "revision": artifact.revision}
    assert (acts[0]["from"], acts[0]["request_id"], acts[0]["tenant"]) == ("127.0.0.1", "act-1", "acme")
    assert acts[0]["target"] == path
    assert log.stat().st_mode & 0o777 == 0o600


async def test_capos_own_client_shows_its_key_and_is_told_when_it_is_none(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        address = f"127.0.0.1:{service.grpc_port}"
        async with AsyncCapoClient(address, api_key=service.key().text) as client:
            assert [model.id for model in await client.models()] == [BASE]
        async with AsyncCapoClient(address, api_key=new_secret().text) as client:
            with pytest.raises(AuthenticationError) as caught:
                await client.models()
    assert caught.value.code == "invalid_api_key"
