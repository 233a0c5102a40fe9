"""A tool call that vLLM's own parser cannot read leaves no line in the log; what is wrong with the parser does."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

from serve.engine_api import Call, Endpoint
from serve.observed_llm import current_call
from serve.unread_calls import leave_out_unread_calls

CUT = '<tool_call>{"name": "weather", "argum'


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What vLLM's loggers write."""
    said = io.StringIO()
    handler, vllm = logging.StreamHandler(said), logging.getLogger("vllm")
    vllm.addHandler(handler)
    for _ in range(2):  # engines are started again
        leave_out_unread_calls(current_call)
    assert len(handler.filters) == 1
    yield said
    vllm.removeHandler(handler)


@pytest.fixture(scope="module")
def parser() -> Hermes2ProToolParser:
    tokenizer: Any = SimpleNamespace(get_vocab=dict)
    return Hermes2ProToolParser(tokenizer)


def parsed(parser: Hermes2ProToolParser, text: str, finish_reason: str) -> Any:
    call = Call(Endpoint.CHAT, {}, None, request_id="r", answer_model="m")
    call.finish_reasons.append(finish_reason)
    token = current_call.set(call)
    try:
        return parser.extract_tool_calls(text, ChatCompletionRequest(messages=[]))
    finally:
        current_call.reset(token)


@pytest.mark.parametrize(
    ("text", "finish_reason"),
    [(CUT, "length"), (CUT, "stop"), ("<tool_call>{}", "stop"), ('<tool_call>"Rome"', "stop")],
)
def test_a_call_that_was_cut_or_written_wrong_is_an_answer_and_no_line(
    parser: Hermes2ProToolParser, log: io.StringIO, text: str, finish_reason: str
) -> None:
    assert parsed(parser, text, finish_reason).content == text
    assert log.getvalue() == ""


def test_the_same_outside_of_a_request_is_told(parser: Hermes2ProToolParser, log: io.StringIO) -> None:
    parser.extract_tool_calls(CUT, ChatCompletionRequest(messages=[]))
    assert "Error in extracting tool call" in log.getvalue()


def test_a_parser_that_is_broken_is_told_of(
    parser: Hermes2ProToolParser, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parser, "tool_call_regex", None)
    parsed(parser, CUT, "stop")
    assert "AttributeError" in log.getvalue()
