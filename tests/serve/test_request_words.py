"""What vLLM would refuse by the name of another field, or with a dump of its own, is refused in the client's words."""

from __future__ import annotations

from typing import Any

import pytest

from registry import errors
from serve.engine_api import Endpoint
from serve.request_policy import ALLOWED, check_body

CHAT, COMPLETION, RESPONSES = Endpoint.CHAT, Endpoint.COMPLETION, Endpoint.RESPONSES
MINIMAL: dict[Endpoint, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hello"}]},
    COMPLETION: {"model": "m", "prompt": "hello"},
    RESPONSES: {"model": "m", "input": "hello"},
}
FORMAT = {"type": "json_object"}
TOOL = {"type": "function", "function": {"name": "look"}}
FLAT_TOOL = {"type": "function", "name": "look"}
STRICT_TOOL = {"type": "function", "function": {"name": "see", "strict": True}}


@pytest.mark.parametrize(
    ("endpoint", "fields", "param", "says"),
    [
        (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens", "is 0; at least 1"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "is 0; at least 1"),
        (CHAT, {"max_tokens": -1}, "max_tokens", "is -1; at least 1"),
        (COMPLETION, {"max_tokens": 0}, "max_tokens", "is 0; at least 1"),
        (COMPLETION, {"max_tokens": -1, "echo": True}, "max_tokens", "is -1; at least 0"),
        (CHAT, {"messages": None}, "messages", "got null"),
        (RESPONSES, {"tools": [FLAT_TOOL], "tool_choice": {"type": "function", "name": "zzz"}}, "tool_choice",
         '"zzz", which is none of the tools: "look"'),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "zzz"}}}, "tool_choice",
         '"zzz", which is none of the tools: "look"'),
        (CHAT, {"tool_choice": {"type": "function", "function": {"name": "zzz"}}}, "tool_choice", "no tools"),
        *((RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", **schema}}}, "text.format.schema",
           "must be a JSON schema") for schema in ({}, {"schema": None}, {"schema": []})),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_refusal_names_the_field_that_was_sent_and_what_it_needs(
    endpoint: Endpoint, fields: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(errors.InvalidRequestError) as caught:
        check_body({**MINIMAL[endpoint], **fields}, endpoint)
    assert caught.value.param == param
    assert caught.value.message.startswith(param)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (COMPLETION, {"max_tokens": 0, "echo": True}),
        (RESPONSES, {"tools": [FLAT_TOOL], "tool_choice": {"type": "function", "name": "look"}}),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_at_its_bound_or_names_what_is_there_passes(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    assert check_body({**MINIMAL[endpoint], **fields}, endpoint) == {**MINIMAL[endpoint], **fields}


@pytest.mark.parametrize(
    ("endpoint", "binds", "by"),
    [
        (CHAT, {"response_format": FORMAT}, "response_format"),
        (COMPLETION, {"structured_outputs": {"choice": ["yes"]}}, "structured_outputs"),
        (RESPONSES, {"text": {"format": FORMAT}}, "text"),
        (CHAT, {"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}}, "tool_choice"),
        (RESPONSES, {"tools": [FLAT_TOOL], "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": [TOOL, STRICT_TOOL]}, "strict in tools"),
        (RESPONSES, {"tools": [{**FLAT_TOOL, "strict": True}]}, "strict in tools"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_asks_an_answer_to_go_on_is_refused_beside_what_says_where_it_ends(
    endpoint: Endpoint, binds: dict[str, Any], by: str
) -> None:
    for name, value in (("ignore_eos", True), ("min_tokens", 3)):
        if name not in ALLOWED[endpoint]:
            continue
        with pytest.raises(errors.InvalidRequestError, match=f"^{name} is .*, but {by} says where") as caught:
            check_body({**MINIMAL[endpoint], **binds, name: value}, endpoint)
        assert caught.value.param == name


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (CHAT, {"ignore_eos": True, "min_tokens": 3}),
        (CHAT, {"ignore_eos": True, "min_tokens": 3, "response_format": {"type": "text"}}),
        (CHAT, {"ignore_eos": False, "min_tokens": 0, "response_format": FORMAT}),
        (CHAT, {"ignore_eos": True, "min_tokens": 3, "tools": [TOOL]}),
        (CHAT, {"ignore_eos": True, "min_tokens": 3, "tools": [STRICT_TOOL], "tool_choice": "none"}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_answer_that_nothing_binds_may_be_asked_to_go_on(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    check_body({**MINIMAL[endpoint], **fields}, endpoint)
