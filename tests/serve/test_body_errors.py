"""What is wrong with a body is told by its place in it, of the form that the client meant. vLLM's own models judge."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest

from registry import errors
from serve.body_errors import invalid_body
from serve.engine_api import Endpoint
from serve.request_policy import check_body

CHAT, COMPLETION, RESPONSES, DETOKENIZE = (
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
    DetokenizeRequest,
)
HELLO = {"role": "user", "content": "hello"}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {}}}
FORMATS = "'text' or 'json_schema' or 'json_object'"


@pytest.mark.parametrize(
    ("model", "body", "param", "says"),
    [
        (RESPONSES, {"input": [{"role": "user"}]}, "input.0.content", "is missing"),
        (RESPONSES, {"input": [{"content": "x"}]}, "input.0.role", "is missing"),
        (RESPONSES, {"input": [HELLO, {"role": "user", "content": 5}]}, "input.1.content",
         "must be a text or a list, got 5"),
        (RESPONSES, {"input": [{"type": "function_call", "call_id": "c", "name": "a"}]}, "input.0.arguments",
         "is missing"),
        (RESPONSES, {"input": [{"type": "reasoning"}]}, "input.0.summary", "is missing"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]},
         "input.0.content.0.text", "must be a text, got 5"),
        (RESPONSES, {"input": [5]}, "input.0", "must be an object, got 5"),
        (RESPONSES, {"input": 5}, "input", "must be a text or a list, got 5"),
        (RESPONSES, {}, "input", "is missing"),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "bogus"}}}, "text.format.type",
         f'must be {FORMATS}, got "bogus"'),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name",
         "is missing"),
        (RESPONSES, {"input": "x", "tool_choice": "bogus"}, "tool_choice",
         "must be 'none', 'auto' or 'required' or an object"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content",
         "must be a text or a list, got null"),
        (CHAT, {"messages": [HELLO, {"role": None, "content": "x"}]}, "messages.1.role", "must be a text, got null"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role", "is missing"),
        (CHAT, {"messages": [{"role": "tool", "content": 5, "tool_call_id": "c"}]}, "messages.0.content",
         "must be a text or a list, got 5"),
        (CHAT, {"messages": [HELLO], "response_format": SCHEMA}, "response_format.json_schema.name", "is missing"),
        (CHAT, {"messages": [HELLO], "stop": ["a", 5]}, "stop.1", "must be a text, got 5"),
        (CHAT, {"messages": [HELLO], "reasoning_effort": "x"}, "reasoning_effort", "or 'max', got \"x\""),
        (CHAT, {"messages": [HELLO], "seed": 2**64}, "seed", "less than or equal to 9223372036854775807"),
        (COMPLETION, {"prompt": 5}, "prompt", "must be a list or a text, got 5"),
        (COMPLETION, {"prompt": [5, "a"]}, "prompt.1", 'must be an integer, got "a"'),
        (COMPLETION, {"prompt": ["a", 5]}, "prompt.1", "must be a text, got 5"),
        (DETOKENIZE, {"tokens": ["a"]}, "tokens.0", 'must be an integer, got "a"'),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_body_is_refused_at_its_place_and_by_the_form_it_was_meant_to_have(
    model: type[pydantic.BaseModel], body: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        model.model_validate({"model": "m", **body})
    refusal = invalid_body(caught.value, body)
    assert refusal.param == param
    assert refusal.message.startswith(param)
    assert says in refusal.message


@pytest.mark.parametrize(("number", "param"), [(16, "input.0.arguments"), (64, None)])
def test_of_many_faults_the_first_one_is_told_and_of_very_many_their_number(number: int, param: str | None) -> None:
    """Pydantic tells of all of them or of none, and takes its time for each."""
    body = {"input": [{"type": "function_call", "name": "a"}] * number}
    with pytest.raises(pydantic.ValidationError) as caught:
        RESPONSES.model_validate(body)
    assert (caught.value.error_count() > 10_000) == (param is None)
    refusal = invalid_body(caught.value, body)
    assert refusal.param == param
    assert (str(caught.value.error_count()) in refusal.message) == (param is None)


def after(call: Any) -> dict[str, Any]:
    return {"messages": [HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL, call]}]}


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (Endpoint.RESPONSES, {"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        (Endpoint.RESPONSES, {"input": [{"content": "x"}]}, "input.0.role"),
        *((Endpoint.RESPONSES, {"input": [{"type": "function_call", "call_id": "c", "name": "a", **arguments}]},
           "input.0.arguments") for arguments in ({}, {"arguments": {}})),
        (Endpoint.CHAT, after({**CALL, "function": {"name": "look", "arguments": {}}}),
         "messages.1.tool_calls.1.function.arguments"),
        (Endpoint.CHAT, after({**CALL, "function": {"name": "look"}}), "messages.1.tool_calls.1.function.arguments"),
        (Endpoint.CHAT, after({**CALL, "function": {"arguments": "{}"}}), "messages.1.tool_calls.1.function"),
        (Endpoint.CHAT, after({**CALL, "function": None}), "messages.1.tool_calls.1.function"),
        (Endpoint.CHAT, after({**CALL, "id": None}), "messages.1.tool_calls.1.id"),
        (Endpoint.CHAT, after({**CALL, "type": "custom"}), "messages.1.tool_calls.1.type"),
        (Endpoint.CHAT, after(5), "messages.1.tool_calls.1"),
        (Endpoint.CHAT, {"messages": [HELLO, {"role": "assistant", "tool_calls": 5}]}, "messages.1.tool_calls"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_vllms_models_cannot_place_is_refused_before_they_see_it(
    endpoint: Endpoint, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(errors.InvalidRequestError) as caught:
        check_body({"model": "m", **body}, endpoint)
    assert caught.value.param == param
    assert caught.value.message.startswith(param)
