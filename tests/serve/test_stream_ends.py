"""Answers that look like calls of tools: a stream has the text that the whole answer has, however it is cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.parser import ParserManager

from registry import locate_base_model
from serve.vllm_plugin import stream_ends

Calls = list[tuple[str, str]]

TOOL = {"name": "count", "parameters": {"type": "object"}}
CHAT = ChatCompletionRequest.model_validate(
    {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": TOOL}],
    }
)
RESPONSE = ResponsesRequest.model_validate({"model": "m", "input": "a", "tools": [{"type": "function", **TOOL}]})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(locate_base_model("capo-tiny").path)


@pytest.fixture(scope="module")
def parser() -> Any:
    manager = SimpleNamespace(get_parser=ParserManager.get_parser)
    stream_ends.use(manager)
    return manager.get_parser(tool_parser_name="hermes", enable_auto_tools=True, model_name="capo-tiny")


def whole(reader: Any, text: str, request: Any) -> tuple[str, Calls]:
    _, content, calls = reader.parse(text, request, enable_auto_tools=True)
    return content or "", [(call.name, call.arguments) for call in calls or []]


def streamed(reader: Any, text: str, request: Any, size: int) -> tuple[str, Calls]:
    pieces = [text[start : start + size] for start in range(0, len(text), size)] + [""]
    content, calls = "", dict[int, list[str]]()
    for number, piece in enumerate(pieces):
        delta = reader.parse_delta(
            delta_text=piece,
            delta_token_ids=[1],
            request=request,
            prompt_token_ids=[1],
            finished=number == len(pieces) - 1,
        )
        content += (delta and delta.content) or ""
        for call in (delta and delta.tool_calls) or []:
            told = calls.setdefault(call.index, ["", ""])
            told[0] += call.function.name or ""
            told[1] += call.function.arguments or ""
    return content, [(name, arguments) for name, arguments in calls.values()]


@pytest.mark.parametrize("request_", [CHAT, RESPONSE], ids=["chat", "response"])
@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    "text",
    [
        "no call",
        "a <",
        "<<<",
        "<tool_call>",
        "2 < 3 and <tool",
        'hm <tool_call>{"na',
        "so <tool_call>not json</tool_call> bye",
        '<tool_call>{"of": "something else"}</tool_call>',
        'so <tool_call>{"name": "count", "arguments": {"x": 1}}</tool_call> bye <',
        '<tool_call>{"name": "count", "arguments": {"x": 1}}</tool_call><tool_call>{"name": "count", "arguments": {}}',
    ],
)
def test_a_stream_says_what_the_whole_answer_says(
    tokenizer: Any, parser: Any, text: str, size: int, request_: Any
) -> None:
    expected = whole(parser(tokenizer, request_.tools), text, request_)
    assert streamed(parser(tokenizer, request_.tools), text, request_, size) == expected


def test_a_call_that_only_the_whole_answer_shows_is_handed_out_at_the_end(tokenizer: Any, parser: Any) -> None:
    silent = {"extract_tool_calls_streaming": lambda self, *args, **options: None}
    late = type("Late", (parser,), {"tool_parser_cls": type("Silent", (parser.tool_parser_cls,), silent)})
    text = 'so <tool_call>{"name": "count", "arguments": {"x": 1}}</tool_call>'
    assert streamed(late(tokenizer, CHAT.tools), text, CHAT, 3) == ("so ", [("count", '{"x": 1}')])
