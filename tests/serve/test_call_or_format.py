"""Beside a format a tool can be called: what vLLM makes of the pair, asked of xgrammar's own matcher."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import xgrammar
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.parser import ParserManager

from registry import locate_base_model
from serve.vllm_plugin import call_or_format

MOOD = {"type": "object", "properties": {"title": {"const": "sad"}}, "required": ["title"]}
# xgrammar would drop multipleOf of it, and take its title for the other's.
COUNT = {"type": "object", "properties": {"title": {"type": "integer", "multipleOf": 3}}, "required": ["title"]}
CHAT_FORMATS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "mood", "schema": MOOD}}},
    {"structured_outputs": {"json": MOOD}},
]


def constraint(body: dict[str, Any], request_type: Any = ChatCompletionRequest, *, strict: bool | None = None) -> str:
    """The structural tag that the engine gets; empty: none."""
    tokenizer = AutoTokenizer.from_pretrained(locate_base_model("capo-tiny").path)
    renderer = SimpleNamespace(
        parser=ParserManager.get_parser(tool_parser_name="hermes", enable_auto_tools=True, model_name="capo-tiny")
    )
    call_or_format.use(renderer)
    function = {"name": "count", "parameters": COUNT, "strict": strict}
    tool = {"type": "function", **(function if request_type is ResponsesRequest else {"function": function})}
    request = request_type.model_validate({"model": "m", "tools": [tool], "tool_choice": "auto", **body})
    adjusted = renderer.parser(tokenizer, request.tools).adjust_request(request)
    return (adjusted.structured_outputs and adjusted.structured_outputs.structural_tag) or ""


def allows(tag: str, text: str) -> bool:
    vocabulary = [bytes([byte]) for byte in range(256)] + [b"</s>"]
    information = xgrammar.TokenizerInfo(
        vocabulary, vocab_type=xgrammar.VocabType.RAW, vocab_size=len(vocabulary), stop_token_ids=[256]
    )
    grammar = xgrammar.GrammarCompiler(information, max_threads=1).compile_structural_tag(tag)
    matcher = xgrammar.GrammarMatcher(grammar)
    return bool(matcher.accept_string(text)) and bool(matcher.accept_token(256))


def call(arguments: dict[str, Any]) -> str:
    return f'<tool_call>\n{{"name": "count", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


@pytest.mark.parametrize("form", CHAT_FORMATS, ids=str)
def test_a_chat_with_tools_and_a_format_is_answered_by_a_call_or_in_the_format(form: dict[str, Any]) -> None:
    tag = constraint({"messages": [{"role": "user", "content": "a"}], **form})
    assert allows(tag, '{"title": "sad"}')
    assert allows(tag, call({"title": 3}))
    assert allows(tag, call({"any": "arguments", "title": []})), "of a tool that is not strict"
    assert not allows(tag, '{"title": "glad"}')
    assert not allows(tag, "Neither.")


def test_so_is_a_response() -> None:
    form = {"text": {"format": {"type": "json_schema", "name": "mood", "schema": MOOD}}}
    tag = constraint({"input": "a", **form}, ResponsesRequest)
    assert allows(tag, '{"title": "sad"}')
    assert allows(tag, call({"title": 3}))
    assert not allows(tag, '{"title": "glad"}')


def test_a_strict_tools_arguments_are_held_beside_a_format_of_the_same_names() -> None:
    tag = constraint({"messages": [{"role": "user", "content": "a"}], **CHAT_FORMATS[0]}, strict=True)
    assert allows(tag, call({"title": 3}))
    assert not allows(tag, call({"title": "sad"}))
    assert not allows(tag, '{"title": 3}')


def test_without_a_format_no_grammar_is_held_over_answers_that_may_be_calls() -> None:
    assert constraint({"messages": [{"role": "user", "content": "a"}]}) == ""
