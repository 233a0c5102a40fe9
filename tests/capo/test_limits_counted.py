"""Each limit of docs/security.md, met: its error has a code of its own, which the metric counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import pytest

from capo.keys.records import KeyLimits
from capo_proto.v1 import inference_pb2
from registry import errors
from serve import faces, request_policy, request_shapes
from serve.limits import Limits
from serve.prompt_logprobs import MAX_PROMPT_LOGPROBS
from tests.capo.guarded import Guarded, bearer, guarded
from tests.capo.test_limits import CHUNKED, HEADS, chunk, exchange
from tests.serve.running import BASE, eventually
from tests.serve.test_constraints import Trials
from tests.test_house import ROOT

LIMITS = Limits(max_in_flight=2, max_in_flight_per_model=1)
CHAT: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
COMPLETION: dict[str, Any] = {"model": BASE, "prompt": "hello"}
DEEP: dict[str, Any] = {"type": "object"}
for _ in range(request_shapes.MAX_SCHEMA_DEPTH + 1):
    DEEP = {"not": DEEP}
PROMPT_AT_THE_LIMIT = [5] * (MAX_PROMPT_LOGPROBS // 16 // 2)  # of n 16, each token with its own and one more
LARGE_BODY = b" " * (faces.MAX_REQUEST_BYTES + 1)
LARGE_MESSAGE = inference_pb2.CompletionRequest(model=BASE, prompt="a" * faces.MAX_REQUEST_BYTES).SerializeToString()
LARGE_METADATA = (("x-long", "x" * faces.MAX_HEAD_BYTES),)
UPLOAD = {"filename": "a.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}
TOOL = {"type": "function", "function": {"name": "f"}}

Ask = Callable[[Guarded], Awaitable[tuple[int | str, str | None]]]


def http(operation: str, **options: Any) -> Ask:
    async def ask(service: Guarded) -> tuple[int | str, str | None]:
        answer = await service.ask(operation, None, **options)
        return answer.status, answer.code

    return ask


def chat(**fields: Any) -> Ask:
    return http("POST /v1/chat/completions", json=CHAT | fields)


def completion(**fields: Any) -> Ask:
    return http("POST /v1/completions", json=COMPLETION | fields)


def in_parts(number: int) -> list[dict[str, Any]]:
    """Two messages whose contents have this many parts together."""
    part = {"type": "text", "text": "a"}
    return [{"role": "user", "content": [part] * many} for many in (1, number - 1)]


def with_calls(number: int) -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    return [{"role": "assistant", "tool_calls": [call] * number}]


def raw(sent: list[bytes]) -> Ask:
    async def ask(service: Guarded) -> tuple[int | str, str | None]:
        status, body = await exchange(service, iter(sent))
        return status, json.loads(body)["error"]["code"]

    return ask


def rpc(message: bytes = b"", metadata: tuple[tuple[str, str], ...] = ()) -> Ask:
    async def ask(service: Guarded) -> tuple[int | str, str | None]:
        call = service.channel.unary_unary("/capo.v1.Inference/Complete")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(message, metadata=metadata, timeout=30)
        return caught.value.code().name, dict(caught.value.trailing_metadata())["capo-error-code"]

    return ask


async def while_others_are_answered(service: Guarded, models: list[str]) -> tuple[int | str, str | None]:
    service.engine.answer_gate.clear()
    bodies = [COMPLETION | {"model": model} for model in models]
    running = [asyncio.create_task(service.ask("POST /v1/completions", None, json=body)) for body in bodies]
    await eventually(lambda: service.engine.waiting == len(running))
    answer = await service.ask("POST /v1/completions", None, json=COMPLETION)
    service.engine.answer_gate.set()
    await asyncio.gather(*running)
    return answer.status, answer.code


async def with_all_places_taken(service: Guarded) -> tuple[int | str, str | None]:
    service.publish("other", None, alias="other")
    await service.service.catalog.refresh()
    return await while_others_are_answered(service, [BASE, "other"])


async def with_the_models_places_taken(service: Guarded) -> tuple[int | str, str | None]:
    return await while_others_are_answered(service, [BASE])


async def with_a_slow_constraint(service: Guarded) -> tuple[int | str, str | None]:
    trials = Trials()

    async def check(call: Any) -> None:
        await trials.check("regex", "hang")

    try:
        with patch.object(service.engine, "check", check):
            return await chat()(service)
    finally:
        trials.close()


async def with_costly_constraints_before_it(service: Guarded) -> tuple[int | str, str | None]:
    trials = Trials(longest_wait_seconds=0.1)

    async def check(call: Any) -> None:
        await trials.check("regex", "fine")

    first = asyncio.create_task(trials.check("regex", "hang"))
    await asyncio.sleep(0)
    try:
        with patch.object(service.engine, "check", check):
            return await chat()(service)
    finally:
        first.cancel()
        trials.close()


async def with_a_long_prompt(service: Guarded) -> tuple[int | str, str | None]:
    """The engine alone knows how long a prompt is; tests/e2e/test_clients.py asks a real one."""

    async def complete(call: Any) -> bytes:
        raise errors.InvalidRequestError("it is too long", code="context_length_exceeded")

    with patch.object(service.engine, "complete", complete):
        return await chat()(service)


async def with_too_many_rows(service: Guarded) -> tuple[int | str, str | None]:
    row = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with patch.object(service.tuning.files.storage, "max_file_rows", 1):
        form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", f"{row}\n{row}\n")}}
        return await http("POST /v1/files", **form)(service)


MET: dict[str, tuple[Ask, int | str]] = {
    "headers_too_large": (raw(HEADS["many headers"]), 431),
    "headers_too_large (grpc)": (rpc(metadata=LARGE_METADATA), "RESOURCE_EXHAUSTED"),
    "too_large": (http("POST /v1/chat/completions", content=LARGE_BODY), 413),
    "too_large (grpc)": (rpc(LARGE_MESSAGE), "RESOURCE_EXHAUSTED"),
    "content_encoding": (http("POST /v1/files", content=b"", headers={"Content-Encoding": "gzip"}), 400),
    "n_too_large": (chat(n=request_policy.MAX_N + 1), 400),
    "logprobs_too_large": (chat(logprobs=True, top_logprobs=request_policy.MAX_LOGPROBS + 1), 400),
    "logprobs_too_large (prompt)": (completion(prompt=[*PROMPT_AT_THE_LIMIT, 5], prompt_logprobs=1, n=16), 400),
    "logprobs_too_large (echo)": (completion(prompt=[*PROMPT_AT_THE_LIMIT, 5], echo=True, logprobs=1, n=16), 400),
    "stop_too_large": (chat(stop=["x"] * (request_policy.MAX_STOP_STRINGS + 1)), 400),
    "prompts_too_large": (
        http("POST /v1/completions", json=COMPLETION | {"prompt": ["x"] * (request_policy.MAX_PROMPTS + 1)}),
        400,
    ),
    "messages_too_large": (chat(messages=CHAT["messages"] * (request_policy.MAX_MESSAGES + 1)), 400),
    "messages_too_large (parts)": (chat(messages=in_parts(request_policy.MAX_MESSAGES + 1)), 400),
    "messages_too_large (calls)": (chat(messages=with_calls(request_policy.MAX_MESSAGES + 1)), 400),
    "too_large (values)": (chat(tools=[TOOL | {"a": [0] * request_policy.MAX_VALUES}]), 413),
    "tools_too_large": (chat(tools=[TOOL] * (request_policy.MAX_TOOLS + 1)), 400),
    "logit_bias_too_large": (chat(logit_bias={str(n): 0 for n in range(request_policy.MAX_LOGIT_BIAS + 1)}), 400),
    "bad_words_too_large": (chat(bad_words=["x"] * (request_policy.MAX_BAD_WORDS + 1)), 400),
    "bad_words_too_large (bytes)": (chat(bad_words=["x" * (request_policy.MAX_BAD_WORDS_BYTES + 1)]), 400),
    "allowed_token_ids_too_large": (
        chat(allowed_token_ids=list(range(request_policy.MAX_ALLOWED_TOKEN_IDS + 1))),
        400,
    ),
    "stop_token_ids_too_large": (chat(stop_token_ids=list(range(request_policy.MAX_STOP_TOKEN_IDS + 1))), 400),
    "schema_too_large": (chat(structured_outputs={"json": DEEP}), 400),
    "regex_too_large": (chat(structured_outputs={"regex": "x" * 2049}), 400),
    "grammar_too_large": (chat(structured_outputs={"grammar": "x" * 8193}), 400),
    "choice_too_large": (chat(structured_outputs={"choice": ["x"] * 1025}), 400),
    "file_too_large": (http("POST /v1/uploads", json=UPLOAD | {"bytes": 9 * 1024**3}), 413),
    "too_many_rows": (with_too_many_rows, 413),
    "form_too_large": (raw([CHUNKED, *[chunk(b"\r\n" * 0x8000)] * 4]), 413),
}
DEEPEST: dict[str, Any] = {"type": "object"}
for _ in range(request_shapes.MAX_SCHEMA_DEPTH):
    DEEPEST = {"items": DEEPEST}
BODY = json.dumps(COMPLETION).encode()
# Whatever stands there at the limit is answered; one more is refused above.
AT_THE_LIMIT: dict[str, tuple[Ask, int | str]] = {
    "headers_too_large": (http("GET /livez", headers={"x-long": "x" * (faces.MAX_HEAD_BYTES - 1000)}), 200),
    "too_large": (http("POST /v1/completions", content=BODY.ljust(faces.MAX_REQUEST_BYTES)), 200),
    "n_too_large": (chat(n=request_policy.MAX_N), 200),
    "logprobs_too_large": (chat(logprobs=True, top_logprobs=request_policy.MAX_LOGPROBS), 200),
    "logprobs_too_large (prompt)": (completion(prompt=PROMPT_AT_THE_LIMIT, prompt_logprobs=1, n=16), 200),
    "logprobs_too_large (echo)": (completion(prompt=PROMPT_AT_THE_LIMIT, echo=True, logprobs=1, n=16), 200),
    "stop_too_large": (chat(stop=["x" * request_policy.MAX_STOP_CHARACTERS] * request_policy.MAX_STOP_STRINGS), 200),
    "prompts_too_large": (
        http("POST /v1/completions", json=COMPLETION | {"prompt": ["x"] * request_policy.MAX_PROMPTS}),
        200,
    ),
    "messages_too_large": (chat(messages=CHAT["messages"] * request_policy.MAX_MESSAGES), 200),
    "messages_too_large (parts)": (chat(messages=in_parts(request_policy.MAX_MESSAGES)), 200),
    "messages_too_large (calls)": (chat(messages=with_calls(request_policy.MAX_MESSAGES)), 200),
    "tools_too_large": (chat(tools=[TOOL] * request_policy.MAX_TOOLS), 200),
    "logit_bias_too_large": (chat(logit_bias={str(n): 0 for n in range(request_policy.MAX_LOGIT_BIAS)}), 200),
    "bad_words_too_large": (
        chat(bad_words=["x" * (request_policy.MAX_BAD_WORDS_BYTES // request_policy.MAX_BAD_WORDS)]
             * request_policy.MAX_BAD_WORDS),
        200,
    ),
    "allowed_token_ids_too_large": (chat(allowed_token_ids=list(range(request_policy.MAX_ALLOWED_TOKEN_IDS))), 200),
    "stop_token_ids_too_large": (chat(stop_token_ids=list(range(request_policy.MAX_STOP_TOKEN_IDS))), 200),
    "schema_too_large": (chat(structured_outputs={"json": DEEPEST}), 200),
    "regex_too_large": (chat(structured_outputs={"regex": "x" * request_shapes.MAX_REGEX_CHARACTERS}), 200),
    "grammar_too_large": (chat(structured_outputs={"grammar": "x" * request_shapes.MAX_GRAMMAR_CHARACTERS}), 200),
    "choice_too_large": (chat(structured_outputs={"choice": ["x"] * request_shapes.MAX_CHOICES}), 200),
    "file_too_large": (http("POST /v1/uploads", json=UPLOAD | {"bytes": 8 * 1024**3}), 200),
}  # fmt: skip
PART = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n1\r\n'
MET["invalid_form"] = (raw([CHUNKED, *[chunk(PART)] * 20]), 400)
MET_ALONE: dict[str, tuple[Ask, int]] = {
    "context_length_exceeded": (with_a_long_prompt, 400),
    "constraint_too_large": (chat(structured_outputs={"regex": "x" * 1000}), 400),
    "constraint_too_slow": (with_a_slow_constraint, 400),
    "constraints_busy": (with_costly_constraints_before_it, 503),
    "overloaded": (with_all_places_taken, 503),
    "model_overloaded": (with_the_models_places_taken, 429),
}


async def test_each_limit_is_refused_with_its_code_and_counted(tmp_path: Path) -> None:
    found = {}
    async with guarded(tmp_path, limits=LIMITS) as service:
        for limit, (ask, _) in MET.items():
            found[limit] = await meet(service, limit, ask)
    assert found == {limit: (status, code_of(limit), 1) for limit, (_, status) in MET.items()}


async def test_what_is_at_a_limit_is_answered(tmp_path: Path) -> None:
    async with guarded(tmp_path, limits=LIMITS) as service:
        found = {limit: await ask(service) for limit, (ask, _) in AT_THE_LIMIT.items()}
    assert found == {limit: (status, None) for limit, (_, status) in AT_THE_LIMIT.items()}


@pytest.mark.parametrize("limit", MET_ALONE)
async def test_what_needs_a_service_of_its_own_is_refused_with_its_code_and_counted(tmp_path: Path, limit: str) -> None:
    ask, status = MET_ALONE[limit]
    bounds = Limits(max_constraint_bytes=500) if limit == "constraint_too_large" else LIMITS
    async with guarded(tmp_path, limits=bounds) as service:
        assert await meet(service, limit, ask) == (status, limit, 1)


async def meet(service: Guarded, limit: str, ask: Ask) -> tuple[int | str, str | None, float]:
    """Status, code, and by how much the metric of this limit's code rose."""
    protocol = "grpc" if limit.endswith("(grpc)") else "http"
    before = counted(service, protocol, code_of(limit))
    status, code = await ask(service)
    with contextlib.suppress(TimeoutError):  # the caller tells what did not rise
        await eventually(lambda: counted(service, protocol, code_of(limit)) > before)
    return status, code, counted(service, protocol, code_of(limit)) - before


def code_of(limit: str) -> str:
    return limit.partition(" ")[0]


def counted(service: Guarded, protocol: str, code: str) -> float:
    return service.metrics.get_sample_value("capo_request_errors_total", {"protocol": protocol, "code": code}) or 0.0


@pytest.mark.parametrize(
    ("bound", "limits"),
    [
        ("requests_per_minute", KeyLimits(requests_per_minute=1)),
        ("tokens_per_minute", KeyLimits(tokens_per_minute=1)),
        ("concurrency", KeyLimits(concurrency=1)),
    ],
)
async def test_a_keys_limit_is_counted_by_its_name_too(tmp_path: Path, bound: str, limits: KeyLimits) -> None:
    async with guarded(tmp_path) as service:
        key = bearer(service.key(limits=limits))
        if bound == "concurrency":
            service.engine.answer_gate.clear()
        first = asyncio.create_task(service.ask("POST /v1/completions", key, json=COMPLETION))
        if bound == "concurrency":
            await eventually(lambda: service.engine.waiting == 1)
        else:
            await first
        second = await service.ask("POST /v1/completions", key, json=COMPLETION)
        service.engine.answer_gate.set()
        await first
        labels = {"protocol": "http", "reason": bound}
        assert service.metrics.get_sample_value("capo_access_refusals_total", labels) == 1
        assert counted(service, "http", "rate_limit_exceeded") == 1
    assert (second.status, second.code) == (429, "rate_limit_exceeded")


async def test_a_client_that_reads_nothing_is_given_up_and_counted(tmp_path: Path) -> None:
    async with guarded(tmp_path, stalled_reader_seconds=0.2) as service:
        service.engine._num_tokens = 200_000
        body = json.dumps(COMPLETION | {"stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
        _, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=1024)
        try:
            writer.write(head + body)
            await eventually(lambda: counted(service, "http", "stalled_reader") == 1, seconds=20)
            await eventually(lambda: service.engine.aborted == 1)
        finally:
            writer.transport.abort()
        assert counted(service, "http", "internal_error") == 0


def test_every_code_of_the_document_is_met_here() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    table = text[text.index("## Limits") : text.index("## Classes")]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    told = {code for row in rows for code in re.findall(r"`(\w+)`", row[4])}
    met = set(map(code_of, [*MET, *MET_ALONE])) | {"rate_limit_exceeded", "stalled_reader"}
    assert told == met
    assert [row[1] for row in rows if "`" not in row[4]] == []
