"""Every endpoint that takes JSON: bodies made from our own OpenAPI document, and hostile ones."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.hostile import hostile_body
from tests.fuzz.watch import MODEL, NUM_REQUESTS, Watch, check_http

pytestmark = [pytest.mark.engine, pytest.mark.timeout(0)]

HELLO = {"role": "user", "content": "hello"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["b"]}
FUNCTION = {"name": "look", "description": "Looks.", "parameters": SCHEMA, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": '{"b": "x"}'}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
MOST_TOKENS = 4
_TOKEN_LIMITS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}

# Sound bodies of each endpoint, which hostile ones are made from.
SOUND: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("POST", "/v1/chat/completions"): [
        {"model": MODEL, "messages": [HELLO], "max_tokens": MOST_TOKENS, **fields}
        for fields in (
            {"temperature": 0.5, "top_p": 0.9, "stop": ["a", "b"], "seed": 1, "n": 2},
            {"stream": True, "stream_options": {"include_usage": True}, "logit_bias": {"5": 1.5}},
            {"logprobs": True, "top_logprobs": 2, "frequency_penalty": 0.5, "top_k": 5, "min_p": 0.1},
            {"tools": [TOOL], "tool_choice": "required"},
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}, "stream": True},
            {"response_format": JSON_SCHEMA},
            {"structured_outputs": {"regex": "[ab]{1,5}"}, "stream": True},
            {"structured_outputs": {"choice": ["yes", "no"]}, "bad_words": ["x"], "stop_token_ids": [3]},
            {"structured_outputs": {"grammar": 'root ::= "a" [0-9]'}, "allowed_token_ids": [5, 6, 7]},
            {"messages": [HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                          {"role": "tool", "tool_call_id": "call-1", "content": [{"type": "text", "text": "3"}]}]},
        )
    ],
    ("POST", "/v1/completions"): [
        {"model": MODEL, "prompt": prompt, "max_tokens": MOST_TOKENS, **fields}
        for prompt, fields in (
            ("In the village", {"temperature": 0.5, "echo": True, "logprobs": 2}),
            (["one", "two"], {"stream": True, "n": 2, "seed": 3}),
            ([5, 6, 7], {"prompt_logprobs": 1, "return_token_ids": True}),
            ([[5], [6, 7]], {"truncate_prompt_tokens": 4, "min_tokens": 2, "ignore_eos": True}),
            ("x", {"response_format": JSON_SCHEMA, "repetition_penalty": 1.2}),
        )
    ],
    ("POST", "/v1/responses"): [
        {"model": MODEL, "input": given, "max_output_tokens": MOST_TOKENS, **fields}
        for given, fields in (
            ("hello", {"temperature": 0.5, "instructions": "Be brief.", "stream": True}),
            ([HELLO, {"role": "assistant", "content": "hi"}, HELLO], {"truncation": "disabled"}),
            ("hello", {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required", "stream": True}),
            ("hello", {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}}),
            ([HELLO, {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
              {"type": "function_call_output", "call_id": "c", "output": "3"}], {}),
            ("hello", {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
        )
    ],
    ("POST", "/tokenize"): [
        {"model": MODEL, "prompt": "hello", "return_token_strs": True},
        {"model": MODEL, "messages": [HELLO], "tools": [TOOL]},
    ],
    ("POST", "/detokenize"): [{"model": MODEL, "tokens": [5, 6, 7]}],
    ("PUT", "/v1/aliases/fuzzed"): [
        {"revision": "nothing@1234567890abcdef", "canary": {"revision": "nothing@1234567890abcdef", "percent": 5}}
    ],
    ("POST", "/v1/load_lora_adapter"): [{"lora_name": "fuzzed", "lora_path": "fuzzed", "load_inplace": True}],
    ("POST", "/v1/unload_lora_adapter"): [{"lora_name": "fuzzed"}],
    ("POST", "/v1/fine_tuning/jobs"): [
        {"model": MODEL, "training_file": "file-nothing", "suffix": "a", "seed": 1, "metadata": {"a": "b"},
         "hyperparameters": {"n_epochs": 1}, "capo": {"alias": "fuzzed"}},
        {"model": MODEL, "training_file": "file-nothing", "method": {"type": "dpo", "dpo": {}},
         "integrations": [{"type": "wandb", "wandb": {"project": "a", "tags": ["b"]}}],
         "capo": {"stages": [{"kind": "cpt", "data": [{"path": "file-nothing"}]}, {"scheduler": "linear"}]}},
    ],
    ("POST", "/v1/fine_tuning/checkpoints/fuzzed/permissions"): [{"project_ids": ["red", "blue"]}],
    ("POST", "/v1/uploads"): [
        {"bytes": 100, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune",
         "expires_after": {"anchor": "created_at", "seconds": 3600}}
    ],
    ("POST", "/v1/uploads/fuzzed/complete"): [{"part_ids": ["part_a", "part_b"], "md5": "0" * 32}],
    ("POST", "/v1/webhook_endpoints"): [
        {"name": "a", "url": "https://a.example/b", "event_types": ["fine_tuning.job.failed"]}
    ],
}  # fmt: skip
# As the document writes the paths that have a parameter.
_TEMPLATES = {
    "/v1/aliases/fuzzed": "/v1/aliases/{alias}",
    "/v1/fine_tuning/checkpoints/fuzzed/permissions": "/v1/fine_tuning/checkpoints/{model}/permissions",
    "/v1/uploads/fuzzed/complete": "/v1/uploads/{upload_id}/complete",
}


@pytest.mark.parametrize("endpoint", SOUND, ids=" ".join)
def test_hostile_bodies_are_answered_and_do_no_harm(watch: Watch, endpoint: tuple[str, str]) -> None:
    method, path = endpoint
    of = random.Random(f"{path} hostile")
    with watch.over(f"hostile {method} {path}") as outcomes:
        for body in SOUND[endpoint]:
            outcomes[_send(watch, method, path, json.dumps(body).encode())] += 1
        for _ in range(NUM_REQUESTS):
            outcomes[_send(watch, method, path, hostile_body(of, SOUND[endpoint]))] += 1


def _send(watch: Watch, method: str, path: str, raw: bytes) -> str:
    headers = {"content-type": "application/json"}
    try:
        return check_http(watch.http.request(method, path, content=raw, headers=headers))
    except (AssertionError, httpx.HTTPError) as error:
        raise AssertionError(f"{error!r} for {raw[:3000]!r}") from error


@pytest.fixture(scope="module")
def document(watch: Watch) -> dict[str, Any]:
    response = watch.http.get("/openapi.json")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


def test_the_document_describes_every_endpoint_above(document: dict[str, Any]) -> None:
    described = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }
    assert described == {(method, _TEMPLATES.get(path, path)) for method, path in SOUND}


@pytest.mark.parametrize("endpoint", SOUND, ids=" ".join)
def test_the_document_allows_what_is_sound(document: dict[str, Any], endpoint: tuple[str, str]) -> None:
    import jsonschema

    method, path = endpoint
    operation = document["paths"][_TEMPLATES.get(path, path)][method.lower()]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    for body in SOUND[endpoint]:
        jsonschema.validate(body, {**schema, "components": document["components"]})


@pytest.mark.parametrize("endpoint", SOUND, ids=" ".join)
def test_bodies_made_from_our_document_are_answered_and_do_no_harm(
    watch: Watch, document: dict[str, Any], endpoint: tuple[str, str]
) -> None:
    method, path = endpoint
    schema = schemathesis.openapi.from_dict(document)
    cases = schema[_TEMPLATES.get(path, path)][method].as_strategy()
    with watch.over(f"schema {method} {path}") as outcomes:
        _run(cases, path, outcomes, lambda raw: _send(watch, method, path, raw))


def _run(cases: st.SearchStrategy[Any], path: str, outcomes: Counter[str], send: Callable[[bytes], str]) -> None:
    @settings(
        max_examples=NUM_REQUESTS,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases, st.randoms(use_true_random=False))
    def each(case: Any, of: random.Random) -> None:
        if isinstance(case.body, dict):
            outcomes[send(json.dumps(_made_cheap(case.body, of, path)).encode("utf-8", "surrogatepass"))] += 1

    each()


def _made_cheap(body: dict[str, Any], of: random.Random, path: str) -> dict[str, Any]:
    """Few fields beside the required ones, so that one bad value does not hide all the rest; and few tokens."""
    needed = {"model", "messages", "prompt", "input", "tokens", "revision", "training_file"}
    optional = [name for name in body if name not in needed]
    kept = set(of.sample(optional, min(len(optional), of.choice((0, 1, 2, 3, 8)))))
    body = {name: value for name, value in body.items() if name in needed | kept}
    if "model" in body and of.random() < 0.95:
        body["model"] = MODEL
    if (limit := _TOKEN_LIMITS.get(path)) is not None:
        body[limit] = MOST_TOKENS
        body.pop("max_completion_tokens", None)
    return body
