"""A service's own bounds, below those of the request policy, on both faces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from capo_proto.v1 import inference_pb2
from tests.serve.fake_engine import FakeEngine
from tests.serve.grpc_channel import both_faces
from tests.serve.running import BASE

HELLO: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
LIMITS = {
    "max_n": 2,
    "max_logprobs": 3,
    "max_stop_strings": 1,
    "max_constraint_bytes": 100,
    "max_messages": 2,
    "max_prompts": 2,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "title": "y" * 100}}}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": 3}, "n", "n_too_large"),
        ({"logprobs": True, "top_logprobs": 4}, "top_logprobs", "logprobs_too_large"),
        ({"stop": ["a", "b"]}, "stop", "stop_too_large"),
        ({"messages": HELLO["messages"] * 3}, "messages", "messages_too_large"),
        ({"response_format": SCHEMA}, "response_format", "constraint_too_large"),
        ({"structured_outputs": {"regex": "a" * 200}}, "structured_outputs", "constraint_too_large"),
    ],
)
async def test_a_request_beyond_the_services_bounds_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], param: str, code: str
) -> None:
    async with both_faces(FakeEngine(), tmp_path, **LIMITS) as faces:
        for stream in (False, True):
            refused = await faces.http.post("/v1/chat/completions", json=HELLO | fields | {"stream": stream})
            error = refused.json()["error"]
            assert (refused.status_code, error["param"], error["code"]) == (400, param, code)
        allowed = await faces.http.post("/v1/chat/completions", json=HELLO | {"n": 2, "stop": ["a"]})
        assert allowed.status_code == 200


async def test_what_is_tokenized_has_the_same_bounds(tmp_path: Path) -> None:
    async with both_faces(FakeEngine(), tmp_path, **LIMITS) as faces:
        refused = await faces.http.post("/tokenize", json=HELLO | {"messages": HELLO["messages"] * 3})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "messages_too_large")


async def test_prompts_beyond_the_services_bound_are_refused_by_name(tmp_path: Path) -> None:
    async with both_faces(FakeEngine(), tmp_path, **LIMITS) as faces:
        refused = await faces.http.post("/v1/completions", json={"model": BASE, "prompt": ["a", "b", "c"]})
        allowed = await faces.http.post("/v1/completions", json={"model": BASE, "prompt": [1, 2, 3]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "prompts_too_large")
    assert allowed.status_code == 200, "the tokens of one prompt"


async def test_the_same_bounds_hold_for_grpc(tmp_path: Path) -> None:
    message = inference_pb2.Message(role="user", content="hello")
    async with both_faces(FakeEngine(), tmp_path, **LIMITS) as faces:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await faces.inference.Chat(
                inference_pb2.ChatRequest(model=BASE, messages=[message], sampling=inference_pb2.Sampling(n=3))
            )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["capo-error-param"] == "n"
