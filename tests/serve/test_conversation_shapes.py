"""The engine is asked with the conversation that was sent, whatever its form; vLLM's own code reads it."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.entrypoints.openai.responses.utils import construct_input_messages, should_continue_final_message

from registry import errors
from serve.engine_api import Endpoint
from serve.engine_requests import REQUEST_TYPES
from serve.request_policy import check_body

CHAT, RESPONSES = Endpoint.CHAT, Endpoint.RESPONSES
HELLO = {"role": "user", "content": "hello"}
INPUT_TEXT, OUTPUT_TEXT = {"type": "input_text", "text": "a"}, {"type": "output_text", "text": "a"}
FLAT_CALL = {"type": "function_call", "call_id": "c", "name": "a", "arguments": "{}"}


def check(endpoint: Endpoint, **fields: Any) -> dict[str, Any]:
    return check_body({"model": "m", **fields}, endpoint)


def test_a_name_that_is_null_is_left_out() -> None:
    """vLLM's models take it for a tool's message only."""
    assert check(CHAT, messages=[{**HELLO, "name": None}])["messages"] == [HELLO]


def test_empty_fields_of_another_role_pass() -> None:
    empty = {"reasoning_content": None, "tool_calls": None, "tool_call_id": None, "refusal": None}
    request = REQUEST_TYPES[CHAT].model_validate(check(CHAT, messages=[{**HELLO, **empty}]))
    assert [message["content"] for message in request.messages] == ["hello"]


@pytest.mark.parametrize(
    "item",
    [
        {"content": [OUTPUT_TEXT]},  # the Vercel AI SDK's without an id, and OpenAI's own examples
        {"content": [INPUT_TEXT]},
        {"type": "message", "content": [OUTPUT_TEXT]},
        {"id": "msg_1", "content": [OUTPUT_TEXT]},
        {"type": None, "id": None, "status": None, "phase": None, "content": [{**OUTPUT_TEXT, "logprobs": None}]},
        {"id": "msg_1", "type": "message", "status": "completed",
         "content": [{**OUTPUT_TEXT, "annotations": [{"type": "anything"}], "logprobs": [{"token": 5}]}]},
    ],
    ids=str,
)  # fmt: skip
def test_an_assistants_turn_is_what_it_said_whatever_its_form(item: dict[str, Any]) -> None:
    body = check(RESPONSES, input=[HELLO, {"role": "assistant", **item}, HELLO])
    request = REQUEST_TYPES[RESPONSES].model_validate(body)
    assert construct_input_messages(request_input=request.input) == [
        HELLO,
        {"role": "assistant", "content": "a"},
        HELLO,
    ]


def test_an_answer_that_was_cut_can_still_be_continued() -> None:
    cut = {"role": "assistant", "status": "incomplete", "content": [OUTPUT_TEXT]}
    request = REQUEST_TYPES[RESPONSES].model_validate(check(RESPONSES, input=[HELLO, cut]))
    assert should_continue_final_message(request.input)


def test_what_a_tool_answers_in_parts_is_their_texts() -> None:
    parts = [INPUT_TEXT, {"type": "input_text", "text": "b"}]
    body = check(RESPONSES, input=[FLAT_CALL, {"type": "function_call_output", "call_id": "c", "output": parts}])
    request = REQUEST_TYPES[RESPONSES].model_validate(body)
    assert construct_input_messages(request_input=request.input)[-1] == {
        "role": "tool",
        "content": "a\nb",
        "tool_call_id": "c",
    }


def test_a_reference_to_an_item_is_told_that_nothing_is_stored_and_what_to_do() -> None:
    with pytest.raises(errors.InvalidRequestError, match=r"nothing is stored here\. Send the item itself"):
        check(RESPONSES, input=[{"type": "item_reference", "id": "msg_1"}])
