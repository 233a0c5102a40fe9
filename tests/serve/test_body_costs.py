"""What a large body costs the loop that streams the others' tokens: it is counted before anybody looks into it."""

from __future__ import annotations

from typing import Any

import pytest

from registry import errors
from serve.engine_api import Endpoint
from serve.engine_requests import REQUEST_TYPES
from serve.request_policy import MAX_MESSAGES, MAX_VALUES, check_body
from serve.shape_checks import shown

CHAT, RESPONSES = Endpoint.CHAT, Endpoint.RESPONSES
HELLO = {"role": "user", "content": "hello"}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": ""}}
MINIMAL: dict[Endpoint, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [HELLO]},
    RESPONSES: {"model": "m", "input": "hello"},
}


def refusal(endpoint: Endpoint, **fields: Any) -> errors.CapoError:
    with pytest.raises(errors.CapoError) as caught:
        check_body({**MINIMAL[endpoint], **fields}, endpoint)
    return caught.value


@pytest.mark.parametrize("beside", ["annotations", "logprobs"])
def test_what_stands_beside_an_answers_text_is_shown_to_nobody(beside: str) -> None:
    """100,000 annotations of a wrong form made 400,000 faults: 10 s of the event loop, and 3 GiB."""
    answer = {"type": "output_text", "text": "a", beside: [0] * 100_000}
    turn = {"type": "message", "role": "assistant", "content": [answer]}
    request = REQUEST_TYPES[RESPONSES].model_validate(check_body({"model": "m", "input": [turn]}, RESPONSES))
    assert request.input[0].content[0].annotations == []


def parts(kind: str, number: int) -> tuple[Endpoint, dict[str, Any]]:
    """A body with so many parts or calls of one kind."""
    match kind:
        case "calls":
            return CHAT, {"messages": [HELLO, {"role": "assistant", "tool_calls": [CALL] * number}]}
        case "texts of a tool":
            call = {"type": "function_call", "call_id": "c", "name": "a", "arguments": "{}"}
            output = [{"type": "input_text", "text": "a"}] * number
            return RESPONSES, {"input": [call, {"type": "function_call_output", "call_id": "c", "output": output}]}
        case _:
            summary = [{"type": "summary_text", "text": "a"}] * number
            return RESPONSES, {"input": [HELLO, {"type": "reasoning", "summary": summary}]}


@pytest.mark.parametrize("kind", ["calls", "texts of a tool", "summaries"])
def test_parts_of_every_kind_are_counted(kind: str) -> None:
    endpoint, within = parts(kind, MAX_MESSAGES)
    check_body({"model": "m", **within}, endpoint)
    endpoint, beyond = parts(kind, MAX_MESSAGES + 1)
    assert refusal(endpoint, **beyond).code == "messages_too_large"


def test_a_body_of_more_values_than_anybody_needs_is_too_large() -> None:
    def noted(number: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": "a", "provider_specific_fields": {"a": [0] * number}}
        return {"messages": [message]}

    others = len(["model", "messages", "the message", "role", "content", "provider_specific_fields", "a"])
    check_body({"model": "m", **noted(MAX_VALUES - others)}, CHAT)
    error = refusal(CHAT, **noted(MAX_VALUES - others + 1))
    assert isinstance(error, errors.TooLargeError)
    assert error.param == "messages"
    assert isinstance(refusal(RESPONSES, include=[0] * (MAX_VALUES + 1)), errors.TooLargeError)


def test_the_tokens_of_a_prompt_are_no_such_values() -> None:
    check_body({"model": "m", "prompt": [5] * (MAX_VALUES + 1)}, Endpoint.COMPLETION)


def test_what_is_too_many_is_refused_before_it_is_looked_into() -> None:
    too_wide = {"type": "function", "function": {"name": "a", "parameters": {"const": 10**30}}}
    assert refusal(CHAT, tools=[too_wide] * 129).code == "tools_too_large"
    assert refusal(CHAT, messages=[{**HELLO, "content": 10**30}] * (MAX_MESSAGES + 1)).code == "messages_too_large"


def test_of_a_large_value_no_more_is_written_than_is_shown() -> None:
    unwritable = object()
    assert shown(["x" * 200, unwritable]) == f'["{"x" * 98}'
    assert shown({"a": [1, True, None, "é"]}) == '{"a": [1, true, null, "\\u00e9"]}'
