"""Calls of tools, in a stream: JSON wherever their keys stand, and no call without arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.parser import ParserManager

from registry import locate_base_model
from serve.vllm_plugin import hermes_calls
from tests.serve.test_stream_ends import CHAT, streamed, whole


@pytest.fixture(scope="module")
def reader() -> Any:
    """Makes one for each answer."""
    stock: Any = ParserManager.get_parser(tool_parser_name="hermes", enable_auto_tools=True, model_name="capo-tiny")
    repaired = type("Repaired", (stock.tool_parser_cls,), {})
    hermes_calls.use(repaired)
    kind = type("Parser", (stock,), {"tool_parser_cls": repaired})
    tokenizer = AutoTokenizer.from_pretrained(locate_base_model("capo-tiny").path)
    return lambda: kind(tokenizer, CHAT.tools)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    "call",
    [
        '{"name": "count", "arguments": {"x": "}"}}',
        '{"arguments": {"x": 1}, "name": "count"}',
        '{"name": "count", "arguments": {"x": [1, {"y": 2}]}, "id": 3}',
        '{"id": {"a": 3}, "arguments": {"name": "n", "arguments": {}}, "name": "count"}',
        '\n{"name": "count", "arguments": null} ',
    ],
)
def test_the_arguments_are_those_of_the_whole_answer(reader: Any, call: str, size: int) -> None:
    text = f"so <tool_call>{call}</tool_call>" * 2
    expected, found = whole(reader(), text, CHAT), streamed(reader(), text, CHAT, size)
    assert found[0] == expected[0] == "so "
    assert [(name, json.loads(arguments)) for name, arguments in found[1]] == [
        (name, json.loads(arguments)) for name, arguments in expected[1]
    ]
    assert len(found[1]) == 2


@pytest.mark.parametrize("size", [1, 100])
def test_a_name_without_arguments_is_no_call(reader: Any, size: int) -> None:
    assert whole(reader(), '<tool_call>{"name": "count"}</tool_call>', CHAT)[1] == []
    assert streamed(reader(), '<tool_call>{"name": "count"}</tool_call>', CHAT, size)[1] == []


def test_arguments_come_while_they_are_written(reader: Any) -> None:
    begun = '<tool_call>{"name": "count", "arguments": {"text": "once upon'
    assert streamed(reader(), begun, CHAT, 5)[1] == [("count", '{"text": "once upon')]
