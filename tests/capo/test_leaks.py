"""What answers, logs, metrics and the disk say of secrets, prompts and insides: nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from capo.access_rules import RULES
from capo.keys.secret import new_secret
from capo.logs import JsonLines, TextLines
from capo_proto.v1 import inference_pb2
from registry.principal import Scope
from serve.engine_api import Call, Piece
from tests.capo.guarded import Guarded, bearer, guarded
from tests.capo.log_capture import logged
from tests.serve.running import BASE
from tests.soak.planted_pushes import PUSHES, TAKES_NO_TEXT, operations_with_text

INSIDES = "/root/models/secret-adapter at 0x7f3a9c0b1d20, password=hunter2"
EXCEPTIONS: list[Callable[[], Exception]] = [
    lambda: RuntimeError(f"CUDA error at {INSIDES}"),
    lambda: ValueError(INSIDES),
    lambda: KeyError(INSIDES),
    lambda: TypeError(f"unsupported operand {INSIDES}"),
    lambda: AttributeError(f"object has no attribute {INSIDES}"),
    lambda: OSError(5, "Input/output error", "/root/models/secret-adapter"),
    lambda: AssertionError(INSIDES),
    lambda: MemoryError(INSIDES),
    lambda: UnicodeDecodeError("utf-8", INSIDES.encode(), 0, 1, "invalid start byte"),
    lambda: ZeroDivisionError(INSIDES),
]
TELLTALE = re.compile(
    r"/root|/tmp/|/home|0x[0-9a-f]{6}|Traceback|hunter2|secret-adapter|site-packages|\.py\b|"
    r"(Runtime|Value|Key|Type|Attribute|OS|Assertion|Memory|UnicodeDecode|ZeroDivision)Error"
)
HELLO = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
CHAT = inference_pb2.ChatRequest(model=BASE, messages=[inference_pb2.Message(role="user", content="hello")])


def break_engine(service: Guarded, error: Callable[[], Exception], *, after: int) -> None:
    """Let the engine's insides fail, from the start or after so many events of an answer."""
    engine = service.engine
    stream, pieces = type(engine).stream, type(engine).pieces

    async def failing_complete(call: Call) -> bytes:
        raise error()

    async def failing_stream(call: Call) -> AsyncGenerator[str, None]:
        number = 0
        async for chunk in stream(engine, call):
            if number == after:
                raise error()
            number += 1
            yield chunk

    async def failing_pieces(call: Call) -> AsyncGenerator[Piece, None]:
        number = 0
        async for piece in pieces(engine, call):
            if number == after:
                raise error()
            number += 1
            yield piece

    engine.complete = failing_complete  # type: ignore[method-assign]
    engine.stream = failing_stream  # type: ignore[method-assign]
    engine.pieces = failing_pieces  # type: ignore[method-assign]


async def test_forty_failures_inside_tell_a_client_nothing_but_the_request_id(tmp_path: Path) -> None:
    told: list[str] = []
    async with guarded(tmp_path) as service:
        for number, error in enumerate(EXCEPTIONS):
            asked = {"x-request-id": f"fault-{number}"}
            break_engine(service, error, after=0)
            whole = await service.ask("POST /v1/chat/completions", None, json=HELLO, headers=asked)
            called = await service.ask("/capo.v1.Inference/Chat", None, message=CHAT.SerializeToString())
            begun = await service.ask("/capo.v1.Inference/ChatStream", None, message=CHAT.SerializeToString())
            break_engine(service, error, after=2)
            stream = await service.ask("POST /v1/chat/completions", None, json=HELLO | {"stream": True}, headers=asked)
            assert (whole.status, whole.code) == (500, "internal_error")
            assert whole.headers["x-request-id"] == f"fault-{number}"
            assert (called.status, called.code) == (begun.status, begun.code) == ("INTERNAL", "internal_error")
            assert stream.status == 200
            assert "[DONE]" not in stream.body
            assert '"internal_error"' in stream.body
            told += [json.dumps(whole.body), f"{called.body} {called.headers}", f"{begun.body}", stream.body]
    assert len(told) == 40
    assert [text for text in told if TELLTALE.search(text)] == []


async def test_a_failure_inside_is_logged_once_with_its_request_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with guarded(tmp_path) as service:
        break_engine(service, lambda: RuntimeError(INSIDES), after=0)
        answer = await service.ask("POST /v1/chat/completions", None, json=HELLO, headers={"x-request-id": "fault-7"})
    assert answer.status == 500
    with_traceback = [record.getMessage() for record in caplog.records if record.exc_info]
    assert with_traceback == ["request fault-7 failed"]


async def test_a_failure_of_the_store_tells_nothing_either(tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(INSIDES)

    async with guarded(tmp_path) as service:
        service.tuning.jobs.seen_by = fail  # type: ignore[method-assign]
        service.tuning.files.seen_by = fail  # type: ignore[method-assign]
        answers = [
            await service.ask("GET /v1/files", None),
            await service.ask("GET /v1/fine_tuning/jobs", None),
            await service.ask("/capo.v1.Tuning/ListJobs", None),
        ]
    assert [answer.status for answer in answers] == [500, 500, "INTERNAL"]
    assert [answer for answer in answers if TELLTALE.search(f"{answer.body} {answer.headers}")] == []


# -- what is planted ----------------------------------------------------------------------------------------------

PROMPT = "plantedprompt7f3a"
"""Stands in every prompt, training row and body below."""


def rows(text: str) -> bytes:
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    return (json.dumps(row) + "\n").encode() * 12


FORM = {"purpose": "fine-tune"}
ASKED = HELLO | {"messages": [{"role": "user", "content": PROMPT}]}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("POST /v1/chat/completions", {"json": ASKED | {"n": 10**9}}),
    ("POST /v1/chat/completions", {"json": ASKED | {"model": "nobodys"}}),
    ("POST /v1/chat/completions", {"content": json.dumps(ASKED).encode() + b"}"}),
    ("POST /v1/completions", {"json": {"model": BASE, "prompt": PROMPT, "logprobs": 10**6}}),
    ("POST /v1/completions", {"json": {"model": BASE, "prompt": [PROMPT] * 40}}),
    ("POST /v1/files", {"files": {"file": ("rows.jsonl", rows(PROMPT)[:-9])}, "data": FORM}),
    ("POST /v1/files", {"files": {"file": ("rows.jsonl", PROMPT.encode())}, "data": FORM}),
    ("POST /v1/fine_tuning/jobs", {"content": json.dumps(ASKED).encode()}),
    ("PUT /v1/aliases/{alias:path}", {"path": "/v1/aliases/x", "content": json.dumps(ASKED).encode()}),
]
RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("POST /v1/chat/completions", {"json": ASKED}),
    ("POST /v1/chat/completions", {"json": ASKED | {"stream": True}}),
    ("POST /v1/completions", {"json": {"model": BASE, "prompt": PROMPT}}),
    ("POST /tokenize", {"json": {"model": BASE, "prompt": PROMPT}}),
]


async def push_everywhere(service: Guarded, key: str) -> list[str]:
    """The prompt and the key by every path, with wrong requests, failures and a crash. What the errors said."""
    said = []
    for operation, options in WRONG:
        answer = await service.ask(operation, key, **options)
        assert 400 <= int(answer.status) < 500, (operation, answer)
        said.append(f"{answer.body} {answer.headers}")
    for operation, options in RIGHT:
        assert (await service.ask(operation, key, **options)).status == 200
    for method in ("Chat", "ChatStream"):
        request = inference_pb2.ChatRequest(model=BASE, messages=[inference_pb2.Message(role="user", content=PROMPT)])
        assert (
            await service.ask(f"/capo.v1.Inference/{method}", key, message=request.SerializeToString())
        ).status == "OK"
        request.model = "nobodys"
        answer = await service.ask(f"/capo.v1.Inference/{method}", key, message=request.SerializeToString())
        said.append(f"{answer.body} {answer.headers}")
    file = await service.ask("POST /v1/files", key, files={"file": ("rows.jsonl", rows(PROMPT))}, data=FORM)
    await service.ask("POST /v1/fine_tuning/jobs", key, json={"model": BASE, "training_file": file.body["id"]})
    for after in (0, 1):
        break_engine(service, lambda: RuntimeError(f"no room for {PROMPT}"), after=after)
        for is_stream in (True, False):
            answer = await service.ask("POST /v1/chat/completions", key, json=ASKED | {"stream": is_stream})
            said.append(f"{answer.body} {answer.headers}")
    service.engine.die()
    said.append(str((await service.ask("POST /v1/chat/completions", key, json=ASKED)).body))
    return said


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
async def test_no_secret_and_no_prompt_is_found_in_logs_metrics_errors_or_the_audit_log(
    tmp_path: Path, formatter: logging.Formatter
) -> None:
    """At debug level, with every logger on, and with the prompt in the text of the exceptions inside."""
    asyncio.get_running_loop().set_debug(True)
    with logged(formatter, logging.DEBUG) as log:
        places, planted = await life_with_crashes(tmp_path)
    places["logs"] = log.getvalue()
    assert "RuntimeError" in places["logs"]
    assert [(place, secret) for place, text in places.items() for secret in planted if secret in text] == []


async def life_with_crashes(directory: Path) -> tuple[dict[str, str], set[str]]:
    """What is found in each place afterwards, and what must not be found in any."""
    async with guarded(directory) as service:
        good, narrow, revoked = service.key(), service.key(scopes=frozenset({Scope.METRICS})), service.key()
        service.keys.revoke(revoked.key_id)
        service.ring.read()
        strange = new_secret()
        said = await push_everywhere(service, bearer(good))
        for secret in (narrow, revoked, strange):
            for operation in (
                "POST /v1/chat/completions",
                "PUT /v1/aliases/{alias:path}",
                "/capo.v1.Adapters/SetAlias",
            ):
                answer = await service.ask(operation, bearer(secret))
                said.append(f"{answer.body} {answer.headers}")
        page = generate_latest(service.metrics).decode() + str((await service.ask("GET /metrics", bearer(good))).body)
    places = {
        "errors": "\n".join(said),
        "metrics": page,
        "audit": (directory / "audit.jsonl").read_text(),
        "job store": b"".join(path.read_bytes() for path in directory.glob("jobs.sqlite*")).decode("latin-1"),
    }
    assert good.key_id in places["metrics"], "the places are those where it could be"
    assert good.key_id in places["job store"]
    assert "SetAlias" in places["audit"]
    planted = {PROMPT}
    for secret in (good, narrow, revoked, strange):
        planted |= {secret.text, secret.text.split("_", 2)[2]}
    return places, planted


def test_the_planted_text_is_pushed_through_every_operation_that_takes_text() -> None:
    """By tests/soak/test_planted_secrets.py; a new operation is pushed there too, or named as one without text."""
    assert set(PUSHES) == operations_with_text()
    assert set(TAKES_NO_TEXT) <= set(RULES)
