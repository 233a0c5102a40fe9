"""What a service has answered, a client sends back as the next request's beginning, in the form that its SDK gives it.

OpenAI's python SDK reads the answers and writes the requests here; vLLM's own code reads what came of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import httpx2
import openai
import pytest
from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
)
from openai.types.responses.response_reasoning_item import Content
from pydantic import BaseModel
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.openai.responses.utils import construct_input_messages
from vllm.sampling_params import SamplingParams

from registry import errors
from serve import responses_answers
from serve.engine_api import Endpoint
from serve.engine_requests import REQUEST_TYPES
from serve.request_policy import check_body

HELLO: dict[str, Any] = {"role": "user", "content": "hello"}
ARGUMENTS = '{"city": "Rome"}'
REPLY = '{"mood": "glad"}'
CALLED = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
FLAT_OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "Sunny."}
TOLD = {"role": "tool", "content": "Sunny.", "tool_call_id": "c1"}


class Reply(BaseModel):
    mood: Literal["glad", "sad"]


class Weather(BaseModel):
    city: str


CHAT_TOOL = openai.pydantic_function_tool(Weather, name="weather")
FLAT_TOOL: Any = {"type": "function", **CHAT_TOOL["function"]}


def vllms_answer() -> ResponsesResponse:
    """All kinds of items that vLLM makes here."""
    text = ResponseOutputText(type="output_text", text=REPLY, annotations=[])
    output = [
        ResponseReasoningItem(
            id="rs_1", type="reasoning", summary=[], content=[Content(type="reasoning_text", text="hm")]
        ),
        ResponseOutputMessage(id="msg_1", type="message", role="assistant", status="completed", content=[text]),
        ResponseFunctionToolCall(id="fc_1", type="function_call", call_id="c1", name="weather", arguments=ARGUMENTS),
    ]
    request = ResponsesRequest(model="m", input="x")
    return ResponsesResponse.from_request(
        request, SamplingParams(), model_name="m", created_time=1, output=output, status="completed"
    )


CHAT_ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {"role": "assistant", "content": REPLY, "refusal": None, "tool_calls": [CALLED]},
        }
    ],
}


class Wire:
    """OpenAI's client, connected to a service that gives one answer and keeps what it is asked."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.body: dict[str, Any] = {}
        http_client = httpx2.Client(transport=httpx2.MockTransport(self._answered))
        self.client = openai.OpenAI(base_url="http://service/v1", api_key="none", http_client=http_client)

    def _answered(self, request: httpx2.Request) -> httpx2.Response:
        self.body = json.loads(request.content)
        return httpx2.Response(200, content=self.answer, headers={"content-type": "application/json"})


def capos_wire() -> Wire:
    return Wire(responses_answers.response(vllms_answer()))


def vllms_wire() -> Wire:
    """With every null that vLLM writes."""
    return Wire(vllms_answer().model_dump_json(by_alias=True).encode())


def heard(wire: Wire, sent: list[Any]) -> Any:
    """The conversation as vLLM hands it to the chat template, when the SDK is given these items."""
    wire.client.responses.create(model="m", input=[HELLO, *sent, FLAT_OUTPUT], tools=[FLAT_TOOL])
    return read(wire.body)


def read(body: dict[str, Any]) -> Any:
    request = REQUEST_TYPES[Endpoint.RESPONSES].model_validate(check_body(body, Endpoint.RESPONSES))
    return construct_input_messages(request_input=request.input)


def test_the_python_sdks_items_are_the_conversation_in_whatever_form_they_are_sent_back() -> None:
    for wire in (capos_wire(), vllms_wire()):
        created = wire.client.responses.create(model="m", input=[HELLO], tools=[FLAT_TOOL])
        parsed = wire.client.responses.parse(model="m", input=[HELLO], tools=[FLAT_TOOL], text_format=Reply)
        assert parsed.output_parsed == Reply(mood="glad")
        least = heard(wire, [item.model_dump(exclude_none=True) for item in created.output])
        assert (least[0], least[-1]) == (HELLO, TOLD)
        assert REPLY in json.dumps([message.get("content") for message in least[1:-1]]).replace("\\", "")
        for answer in (created, parsed):
            forms: tuple[Callable[[Any], Any], ...] = (
                lambda item: item,
                lambda item: item.to_dict(),
                lambda item: item.model_dump(),
                lambda item: item.model_dump(by_alias=True),
                lambda item: item.model_dump(exclude_unset=True, mode="json"),
            )
            for form in forms:
                assert heard(wire, [form(item) for item in answer.output]) == least


def test_so_are_the_javascript_sdks_and_the_plain_json() -> None:
    """The former adds what it has parsed to texts and calls (openai-node, src/lib/ResponsesParser.ts)."""
    plain = json.loads(capos_wire().answer)["output"]
    least = read({"model": "m", "input": [HELLO, *plain, FLAT_OUTPUT]})
    for of_text, of_call in (({"mood": "glad"}, {"city": "Rome"}), (None, None)):
        reasoning, message, call = json.loads(vllms_wire().answer)["output"]
        message["content"][0]["parsed"] = of_text
        call["parsed_arguments"] = of_call
        assert read({"model": "m", "input": [HELLO, reasoning, message, call, FLAT_OUTPUT]}) == least


def test_an_answers_items_have_no_nulls() -> None:
    for item in json.loads(responses_answers.response(vllms_answer()))["output"]:
        assert None not in item.values(), item["type"]


def test_a_call_that_openai_marked_as_usual_is_one_and_another_is_refused() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": ARGUMENTS}
    usual = {"async": False, "async_": False, "caller": {"type": "direct"}}
    least = read({"model": "m", "input": [HELLO, call, FLAT_OUTPUT]})
    assert read({"model": "m", "input": [HELLO, {**call, **usual}, FLAT_OUTPUT]}) == least
    for unusual in ({"async": True}, {"caller": {"type": "program", "caller_id": "p"}}):
        with pytest.raises(errors.InvalidRequestError, match="unknown key"):
            read({"model": "m", "input": [HELLO, {**call, **unusual}, FLAT_OUTPUT]})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the SDK's, of the class that parse has put in
def test_a_message_of_chats_parse_helper_is_what_was_answered_in_whatever_form_it_is_sent_back() -> None:
    wire = Wire(json.dumps(CHAT_ANSWER).encode())
    chat = wire.client.chat.completions
    plain = chat.create(model="m", messages=[HELLO])
    parsed = chat.parse(model="m", messages=[HELLO], response_format=Reply, tools=[CHAT_TOOL])
    (call,) = parsed.choices[0].message.tool_calls or ()
    assert (parsed.choices[0].message.parsed, call.function.parsed_arguments) == (
        Reply(mood="glad"),
        Weather(city="Rome"),
    )
    for message in (plain.choices[0].message, parsed.choices[0].message):
        for form in (message, message.to_dict(), message.model_dump(), message.model_dump(exclude_none=True)):
            chat.create(model="m", messages=[HELLO, form, TOLD])
            assert check_body(wire.body, Endpoint.CHAT)["messages"] == [
                HELLO,
                {"role": "assistant", "content": REPLY, "tool_calls": [CALLED]},
                TOLD,
            ]


@pytest.mark.parametrize("message", [
    {"role": "user", "content": "hello", "parsed": {"a": 1}},
    {"role": "assistant", "content": "hello", "parsd": {"a": 1}},
], ids=str)  # fmt: skip
def test_what_no_sdk_notes_there_stays_an_unknown_key(message: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidRequestError, match="unknown key 'pars"):
        check_body({"model": "m", "messages": [message]}, Endpoint.CHAT)
