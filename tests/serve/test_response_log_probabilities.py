"""Streams of /v1/responses have a log probability for each token, in vLLM's own loop over what an engine hands out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaMessage, DeltaToolCall
from vllm.entrypoints.openai.responses import serving
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from serve.vllm_plugin import response_log_probabilities

REQUEST = ResponsesRequest(model="m", input="x", include=["message.output_text.logprobs"])
CALL = DeltaMessage(
    tool_calls=[DeltaToolCall(index=0, id="c", type="function", function=DeltaFunctionCall(name="f", arguments="{}"))]
)


@pytest.fixture
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SimpleContext", "SimpleStreamingEventProcessor"):
        monkeypatch.setattr(serving, name, getattr(serving, name))  # undone at the end
    response_log_probabilities.use(serving)


class Serving(serving.OpenAIServingResponses):
    """Without an engine."""

    def __init__(self) -> None:
        self.return_tokens_as_token_ids = False


def made(number: int, text: str, *, is_last: bool, has_logprobs: bool = True) -> RequestOutput:
    """One token, whose number is its log probability too."""
    completion = CompletionOutput(
        index=0,
        text=text,
        token_ids=[number],
        cumulative_logprob=None,
        logprobs=[{number: Logprob(-float(number), 1, f"token {number}")}] if has_logprobs else None,
        finish_reason="stop" if is_last else None,
    )
    return RequestOutput("r", None, [1], None, [completion], is_last)


class Parser:
    """What is in brackets is a call."""

    def parse_delta(self, *, delta_text: str, **_: Any) -> DeltaMessage | None:
        return CALL if delta_text == "[call]" else DeltaMessage(content=delta_text) if delta_text else None


async def events(*texts: str, parser: Parser | None = None, request: ResponsesRequest = REQUEST) -> list[Any]:
    context = serving.SimpleContext(response_parser=parser)

    async def outputs() -> AsyncIterator[Any]:
        for number, text in enumerate(texts):
            context.append_output(made(number, text, is_last=number == len(texts) - 1, has_logprobs=request is REQUEST))
            yield context

    loop = Serving()._process_simple_streaming_events(
        request, SimpleNamespace(), outputs(), context, "m", None, SimpleNamespace(), 1, lambda event: event
    )
    return [event async for event in loop]


def told(events: list[Any]) -> list[tuple[str, list[float]]]:
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    return [(event.delta, [-entry.logprob for entry in event.logprobs]) for event in deltas]


def in_items(events: list[Any]) -> list[list[float]]:
    items = [event.item for event in events if event.type == "response.output_item.done"]
    return [[-entry.logprob for entry in item.content[0].logprobs] for item in items if item.type == "message"]


@pytest.mark.usefixtures("repaired")
@pytest.mark.parametrize("parser", [None, Parser()], ids=["plain", "parsed"])
class TestLogProbabilities:
    async def test_of_tokens_without_text_come_with_the_next_text(self, parser: Parser | None) -> None:
        found = await events("", "a", "", "", "b", parser=parser)
        assert told(found) == [("a", [0, 1]), ("b", [2, 3, 4])]
        assert in_items(found) == [[0, 1, 2, 3, 4]]

    async def test_behind_the_last_text_come_at_the_end(self, parser: Parser | None) -> None:
        found = await events("a", "", "", parser=parser)
        assert told(found) == [("a", [0]), ("", [1, 2])]
        assert in_items(found) == [[0, 1, 2]]

    async def test_that_nobody_asked_for_make_no_events(self, parser: Parser | None) -> None:
        found = await events("a", "", "b", "", parser=parser, request=ResponsesRequest(model="m", input="x"))
        assert told(found) == [("a", []), ("b", [])]


@pytest.mark.usefixtures("repaired")
async def test_log_probabilities_of_a_call_belong_to_no_text() -> None:
    found = await events("a", "", "[call]", "", "[call]", "b", parser=Parser())
    assert told(found) == [("a", [0]), ("b", [5])]


async def test_stock_vllm_loses_them() -> None:
    assert told(await events("a", "", "b", "")) == [("a", [0]), ("b", [2])], "the repair can go"
