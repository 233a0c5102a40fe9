"""An answer of /v1/responses that was cut says so in the response, in its last item, and in the stream's events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import ResponseCompletedEvent as OpenAICompletedEvent
from openai.types.responses import ResponseOutputItemDoneEvent, ResponseOutputMessage, ResponseOutputText
from vllm.entrypoints.openai.responses.protocol import ResponseCompletedEvent, ResponsesRequest, ResponsesResponse
from vllm.sampling_params import SamplingParams

from serve import responses_answers


def message(number: int) -> ResponseOutputMessage:
    """As vLLM makes them: completed, whatever ended it."""
    text = ResponseOutputText(type="output_text", text="hello", annotations=[])
    return ResponseOutputMessage(
        id=f"msg_{number}", type="message", role="assistant", status="completed", content=[text]
    )


def answer(status: str) -> ResponsesResponse:
    request = ResponsesRequest(model="m", input="x")
    return ResponsesResponse.from_request(
        request, SamplingParams(), model_name="m", created_time=1, output=[message(1), message(2)], status=status
    )


def data(event: str) -> Any:
    return json.loads(event.partition("\ndata: ")[2])


@pytest.mark.parametrize(
    ("status", "last"), [("incomplete", "incomplete"), ("completed", "completed")], ids=["cut", "whole"]
)
def test_the_last_item_of_an_answer_that_was_cut_is_incomplete(status: str, last: str) -> None:
    told = json.loads(responses_answers.response(answer(status)))
    assert told["status"] == status
    assert [item["status"] for item in told["output"]] == ["completed", last]


@pytest.mark.parametrize(
    ("status", "kind", "last"),
    [
        ("incomplete", "response.incomplete", "incomplete"),
        ("completed", "response.completed", "completed"),
    ],
    ids=["cut", "whole"],
)
def test_a_stream_that_was_cut_ends_with_an_incomplete_response_and_item(status: str, kind: str, last: str) -> None:
    ended = ResponseCompletedEvent(type="response.completed", sequence_number=9, response=answer(status))
    event = responses_answers.event(ended, is_cut=status == "incomplete")
    assert event.startswith(f"event: {kind}\n")
    assert data(event)["type"] == kind
    assert [item["status"] for item in data(event)["response"]["output"]] == ["completed", last]
    if status == "completed":
        OpenAICompletedEvent.model_validate(data(event))


@pytest.mark.parametrize("is_cut", [True, False])
def test_an_item_is_done_as_incomplete_where_it_was_cut(is_cut: bool) -> None:
    done = ResponseOutputItemDoneEvent(
        type="response.output_item.done", item=message(1), output_index=0, sequence_number=5
    )
    event = data(responses_answers.event(done, is_cut=is_cut))
    assert event["item"]["status"] == ("incomplete" if is_cut else "completed")
