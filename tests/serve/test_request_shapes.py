"""What stands within a request is allowed or refused by name, in all its depth, before the engine sees it."""

from __future__ import annotations

import copy
import json
from typing import Any, get_args, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as OpenAIChat
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as OpenAICompletion
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming as OpenAIResponse

from registry import errors
from serve.engine_api import Endpoint
from serve.request_fields import ALLOWED, HARMLESS_VALUES, LABELS, REFUSED, REQUIRED
from serve.request_policy import check_body, parse_body
from serve.request_shapes import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH

HELLO = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
FLAT_TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}}
MINIMAL: dict[Endpoint, dict[str, Any]] = {
    Endpoint.CHAT: {"model": "m", "messages": [HELLO]},
    Endpoint.COMPLETION: {"model": "m", "prompt": "hello"},
    Endpoint.RESPONSES: {"model": "m", "input": "hello"},
    Endpoint.TOKENIZE: {"model": "m", "prompt": "hello"},
    Endpoint.DETOKENIZE: {"model": "m", "tokens": [1]},
}
FLAT_CALL = {"type": "function_call", "call_id": "c", "name": "a", "arguments": "{}"}
INPUT_TEXT, IMAGE = {"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "https://a.example"}
DROPPED = {"type": "array", "items": {"type": "integer", "multipleOf": 3}}
STRICT = {"name": "look", "strict": True}
BAD_ARGUMENTS = ("{bad", "[1, 2]", "null", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "\\ud800"}', "[" * 100_000)
OPENAI_TYPES = {
    Endpoint.CHAT: OpenAIChat,
    Endpoint.COMPLETION: OpenAICompletion,
    Endpoint.RESPONSES: OpenAIResponse,
}
OPENAI_FIELDS = {endpoint: get_type_hints(OPENAI_TYPES.get(endpoint, dict)) for endpoint in Endpoint}
BOOLEANS = (
    "stream", "echo", "parallel_tool_calls", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
    "spaces_between_special_tokens", "add_special_tokens", "return_token_ids", "add_generation_prompt",
    "continue_final_message", "return_token_strs",
)  # fmt: skip
CHAT, COMPLETION, RESPONSES, TOKENIZE = Endpoint.CHAT, Endpoint.COMPLETION, Endpoint.RESPONSES, Endpoint.TOKENIZE


def after_call(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return [HELLO, {"role": "assistant", "tool_calls": [call]}]


def check(endpoint: Endpoint, **fields: Any) -> dict[str, Any]:
    return check_body(copy.deepcopy({**MINIMAL[endpoint], **fields}), endpoint)


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [
        (CHAT, {"messages": [{**HELLO, "contnet": "x"}]}, "messages.0.contnet"),
        (CHAT, {"messages": [{**HELLO, "tool_calls": [{"id": "c"}]}]}, "messages.0.tool_calls"),
        *((CHAT, {"messages": after_call(arguments)}, "messages.1.tool_calls.0.function.arguments")
          for arguments in BAD_ARGUMENTS),
        *((RESPONSES, {"input": [{"type": "function_call", "call_id": "c", "name": "a", "arguments": arguments}]},
           "input.0.arguments") for arguments in BAD_ARGUMENTS),
        (CHAT, {"messages": ["hello"]}, "messages.0"),
        (CHAT, {"messages": [{**HELLO, "name": 7}]}, "messages.0.name"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        (CHAT, {"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]}, "messages.0.refusal"),
        (CHAT, {"tools": [{**TOOL, "cache_control": {}}]}, "tools.0.cache_control"),
        (CHAT, {"tools": [{"type": "web_search"}]}, "tools.0.type"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a", "strikt": True}}]}, "tools.0.function.strikt"),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (CHAT, {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
         "response_format"),
        (CHAT, {"structured_outputs": 9223372036854775808}, "structured_outputs"),
        (RESPONSES, {"text": {"a": [{}]}}, "text.a"),
        (CHAT, {"response_format": "json"}, "response_format"),
        (RESPONSES, {"text": {"format": "json"}}, "text.format"),
        (RESPONSES, {"reasoning": "high"}, "reasoning"),
        (CHAT, {"response_format": {"type": "grammar"}}, "response_format"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
        (CHAT, {"response_format": {"type": "json_object", "json_schema": {}}}, "response_format"),
        (CHAT, {"response_format": schema_format({"a": "x" * MAX_SCHEMA_BYTES})}, "response_format.json_schema.schema"),
        (CHAT, {"response_format": schema_format(nested(MAX_SCHEMA_DEPTH + 1))}, "response_format.json_schema.schema"),
        # What the engine would not hold (serve/schema_keywords.py), wherever a schema may stand.
        (CHAT, {"response_format": schema_format(DROPPED)}, "response_format.json_schema.schema"),
        (COMPLETION, {"response_format": schema_format(DROPPED)}, "response_format.json_schema.schema"),
        (CHAT, {"structured_outputs": {"json": DROPPED}}, "structured_outputs.json"),
        (CHAT, {"structured_outputs": {"json": json.dumps(DROPPED)}}, "structured_outputs.json"),
        (CHAT, {"structured_outputs": {"json": json.dumps(nested(MAX_SCHEMA_DEPTH + 1))}}, "structured_outputs.json"),
        (CHAT, {"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "a", "schema": DROPPED}}},
         "text.format.schema"),
        (CHAT, {"tools": [{"type": "function", "function": {**STRICT, "parameters": DROPPED}}]},
         "tools.0.function.parameters"),
        (RESPONSES, {"tools": [{"type": "function", **STRICT, "parameters": DROPPED}]}, "tools.0.parameters"),
        (CHAT, {"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        (CHAT, {"structured_outputs": {}}, "structured_outputs"),
        (CHAT, {"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        (CHAT, {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
         "structured_outputs.whitespace_pattern"),
        (CHAT, {"structured_outputs": {"regex": "a" * 5000}}, "structured_outputs"),
        (CHAT, {"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        (CHAT, {"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
        (CHAT, {"user": 5}, "user"),
        (CHAT, {"top_k": 10**30}, "top_k"),
        (CHAT, {"response_format": schema_format({"enum": [-(10**30)]})}, "response_format"),
        (CHAT, {"tools": [{"type": "function", "function": {"description": "nameless"}}]}, "tools.0.function"),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (RESPONSES, {"tools": [{"type": "function"}]}, "tools.0"),
        (CHAT, {"stream": True, "stream_options": 5}, "stream_options"),
        (RESPONSES, {"text": [1]}, "text"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"guided_json": {}}, "guided_json"),
        (CHAT, {"verbosity": "low"}, "verbosity"),
        (COMPLETION, {"logprobs": True}, "logprobs"),
        (RESPONSES, {"store": True}, "store"),
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"tools": [TOOL]}, "tools.0.function"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        (RESPONSES, {"input": [{"role": "assistant", "content": [{"type": "output_text", "text": "a"}] * 2}]},
         "input.0"),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": [{}]}]}, "input.0.output.0"),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": []}]}, "input.0.output"),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": [INPUT_TEXT, IMAGE]}]},
         "input.0.output.1"),
        (RESPONSES, {"input": [{"type": "reasoning", "summary": [{"type": "summary_text"}]}]}, "input.0.summary.0"),
        (RESPONSES, {"input": [{"type": "reasoning", "summary": [], "content": [INPUT_TEXT]}]}, "input.0.content.0"),
        (RESPONSES, {"input": [{**HELLO, "status": "done"}]}, "input.0.status"),
        (RESPONSES, {"input": [{**HELLO, "id": [1]}]}, "input.0.id"),
        (RESPONSES, {"truncation": "auto"}, "truncation"),
        *((endpoint, {"truncate_prompt_tokens": number}, "truncate_prompt_tokens")
          for endpoint in (CHAT, COMPLETION) for number in (-1, 0)),
        *((CHAT, {"messages": [HELLO, {"role": role, "content": "x"}]}, "messages.1.role")
          for role in ("User", "model", "function", "", None, ["user"])),
        (TOKENIZE, {"prompt": None, "messages": [{"role": "model", "content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "assistant", "content": 5}]}, "messages.0.content"),
        (CHAT, {"messages": []}, "messages"),
        (TOKENIZE, {"prompt": None, "messages": []}, "messages"),
        (RESPONSES, {"input": []}, "input"),
        (RESPONSES, {"top_logprobs": 2}, "top_logprobs"),
        (RESPONSES, {"text": {"verbosity": "low"}}, "text.verbosity"),
        (RESPONSES, {"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        (RESPONSES, {"include": ["reasoning.encrypted_content"]}, "include"),
        (TOKENIZE, {"messages": [HELLO]}, "prompt"),
        (CHAT, {"messages": None}, "messages"),
        *((CHAT, {"messages": [{"role": role}]}, "messages.0.content") for role in ("system", "developer", "user")),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        (RESPONSES, {"input": [HELLO, {"role": "user"}]}, "input.1.content"),
        (RESPONSES, {"input": [{**FLAT_CALL, "call_id": None}]}, "input.0.call_id"),
        (CHAT, {"messages": [HELLO, {"role": "tool", "content": "x"}]}, "messages.1.tool_call_id"),
        (CHAT, {"messages": [*after_call("{}"), {"role": "tool", "content": "x", "tool_call_id": "d"}]},
         "messages.2.tool_call_id"),
        (CHAT, {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}, *after_call("{}")]},
         "messages.0.tool_call_id"),
        (CHAT, {"messages": [*after_call("{}"), {"role": "tool", "tool_call_id": "c"}]}, "messages.2.content"),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input.0.call_id"),
        (RESPONSES, {"input": [FLAT_CALL, {"type": "function_call_output", "call_id": "d", "output": "x"}]},
         "input.1.call_id"),
        (CHAT, {"max_tokens": 2, "max_completion_tokens": 5}, "max_tokens"),
        *((CHAT, {"metadata": value}, "metadata") for value in ({"a": "b"}, [], "")),
        *((RESPONSES, {"metadata": value}, "metadata")
          for value in ({"a": 1}, {"": "b"}, {"a" * 65: "b"}, {"a": "b" * 513}, {str(n): "" for n in range(17)}, [])),
        (CHAT, {"prompt_cache_options": {}}, "prompt_cache_options"),
        (CHAT, {"store": 0}, "store"),
        (RESPONSES, {"n": 2}, "n"),
        (CHAT, {"echo": 0}, "echo"),
        (CHAT, {"documents": [{}]}, "documents"),
        *((COMPLETION, {"best_of": 3, **n}, "best_of") for n in ({}, {"n": 2}, {"n": 4})),
        (CHAT, {"n": 0}, "n"),
        (COMPLETION, {"n": -1}, "n"),
        (TOKENIZE, {"add_generation_prompt": True}, "add_generation_prompt"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_would_be_ignored_is_refused_by_its_place(endpoint: Endpoint, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(errors.InvalidRequestError) as caught:
        check(endpoint, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (CHAT, {"messages": [HELLO, {"role": "assistant", "content": "a", "annotations": [], "tool_calls": []}]}),
        (CHAT, {"messages": [HELLO, {"role": "assistant", "content": "a", "provider_specific_fields": {"a": 1}}]}),
        *((CHAT, {"messages": after_call(arguments)}) for arguments in ("", "{}", ' {"a": [1, {"b": null}]} ')),
        (CHAT, {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "text"}}),
        (CHAT, {"tools": [TOOL], "response_format": schema_format({"type": "object"})}),
        (CHAT, {"structured_outputs": {"json": '{"type": "integer", "minimum": 5}'}}),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "look", "parameters": DROPPED}}]}),
        (CHAT, {"tools": [{"type": "function", "function": {**STRICT, "parameters": {"properties": {}}}}]}),
        (CHAT, {"response_format": schema_format(nested(MAX_SCHEMA_DEPTH))}),
        (RESPONSES, {"tools": [FLAT_TOOL], "tool_choice": {"type": "function", "name": "look"}}),
        (CHAT, {"messages": [*after_call("{}"), {"role": "tool", "content": "x", "tool_call_id": "c"}]}),
        (RESPONSES, {"input": [FLAT_CALL, {"type": "function_call_output", "call_id": "c", "output": "x"}]}),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 5}),
        (RESPONSES, {"metadata": {}}),
        (RESPONSES, {"metadata": {str(n).zfill(64): "b" * 512 for n in range(16)}}),
        (RESPONSES, {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "reasoning": {"effort": None}}),
        (RESPONSES, {"input": [HELLO, {"type": "function_call", "id": "i", "call_id": "c", "name": "a",
                                       "arguments": "{}", "status": "completed"}]}),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_means_something_or_asks_for_nothing_passes(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    assert check(endpoint, **fields) == {**MINIMAL[endpoint], **fields}


@pytest.mark.parametrize("endpoint", Endpoint)
def test_fields_that_ask_for_nothing_do_not_reach_the_engine(endpoint: Endpoint) -> None:
    for name, values in HARMLESS_VALUES.items():
        for value in values if name not in ALLOWED[endpoint] else ():
            assert check(endpoint, **{name: value}) == MINIMAL[endpoint], f"{name}={value!r}"
    for name in LABELS:
        assert check(endpoint, **{name: "someone"}) == MINIMAL[endpoint]


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        *((CHAT, {name: value}) for name, value in {
            "best_of": 1, "echo": False, "use_beam_search": False, "length_penalty": 1.0, "functions": [],
            "function_call": "none", "chat_template_kwargs": {}, "documents": [], "priority": 0,
        }.items()),
        (COMPLETION, {"best_of": 1, "length_penalty": 1}),
        (COMPLETION, {"best_of": None}),
        (RESPONSES, {"n": 1, "truncation": "disabled"}),
    ],
    ids=str,
)  # fmt: skip
def test_defaults_that_clients_send_ask_for_nothing(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    assert check(endpoint, **fields) == MINIMAL[endpoint]


def test_a_format_that_repeats_the_tool_to_be_called_asks_that_the_call_holds_to_it() -> None:
    """As instructor 1.17 sends it in Mode.RESPONSES_TOOLS."""
    schema = {"type": "object", "properties": {"mood": {"enum": ["glad", 1]}}, "required": ["mood"]}
    tool = {"type": "function", "name": "Reply", "parameters": schema, "description": "Correctly extracted."}
    form = {"type": "json_schema", "name": "Reply", "strict": True, "schema": schema}
    asked = {"tools": [tool, FLAT_TOOL], "tool_choice": {"type": "function", "name": "Reply"}}
    held = {**asked, "tools": [{**tool, "strict": True}, FLAT_TOOL]}
    assert check(RESPONSES, **asked, text={"format": form}) == {**MINIMAL[RESPONSES], **held, "text": {}}
    # What the grammar would drop is told of, whichever of the two asks for it; a format of its own stays one too many.
    unlike = {**schema, "properties": {"mood": {"enum": ["glad", True]}}}
    for parameters, wanted, choice, param in (
        (DROPPED, DROPPED, asked["tool_choice"], "text.format.schema"),
        (schema, unlike, asked["tool_choice"], "text"),
        (schema, schema, "required", "text"),
    ):
        tools = [{**tool, "parameters": parameters}, FLAT_TOOL]
        with pytest.raises(errors.InvalidRequestError) as caught:
            check(RESPONSES, tools=tools, tool_choice=choice, text={"format": {**form, "schema": wanted}})
        assert caught.value.param == param


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETION])
def test_to_choose_the_best_of_as_many_as_are_given_asks_for_nothing(endpoint: Endpoint) -> None:
    assert check(endpoint, n=3, best_of=3) == {**MINIMAL[endpoint], "n": 3}


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": []}], ids=str)
def test_an_empty_prompt_is_told_what_a_prompt_may_be(body: dict[str, Any]) -> None:
    """vLLM would offer a field that is refused here."""
    with pytest.raises(errors.InvalidRequestError, match=r"^prompt must be a text, a list of texts") as caught:
        check_body({"model": "m", **body}, COMPLETION)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("endpoint", Endpoint)
def test_null_asks_for_nothing_in_every_field_that_is_known_and_not_required(endpoint: Endpoint) -> None:
    """vLLM's models refuse it for some, and for some of a response fail after all the work."""
    known = {*ALLOWED[endpoint], *HARMLESS_VALUES, *LABELS, *REFUSED, *OPENAI_FIELDS[endpoint]} - set(
        REQUIRED[endpoint]
    )
    for name in known - MINIMAL[endpoint].keys():
        assert check(endpoint, **{name: None}) == MINIMAL[endpoint], name
    with pytest.raises(errors.InvalidRequestError) as caught:
        check(endpoint, temprature=None)
    assert caught.value.code == "unknown_field"
    for name in REQUIRED[endpoint]:
        with pytest.raises(errors.InvalidRequestError) as caught:
            check(endpoint, **{name: None})
        assert caught.value.param == name


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"include_usage": True, "include_obfuscation": False}, {"stream_options": {"include_usage": True}}),
        ({"include_usage": True, "continuous_usage_stats": None}, {"stream_options": {"include_usage": True}}),
        ({"include_obfuscation": False}, {}),
        ({}, {}),
    ],
)
def test_what_asks_for_nothing_in_stream_options_is_left_out(given: dict[str, Any], asked: dict[str, Any]) -> None:
    for endpoint in (CHAT, COMPLETION):
        body = {"stream": True, **asked}
        assert check(endpoint, stream=True, stream_options=given) == {**MINIMAL[endpoint], **body}


NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
INTEGERS = (
    "n", "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "seed", "top_k", "prompt_logprobs",
    "truncate_prompt_tokens",
)  # fmt: skip


@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_value_of_another_type_is_refused_and_never_taken_for_the_number_it_looks_like(endpoint: Endpoint) -> None:
    wrong: dict[str, list[Any]] = {name: [True, "1", [1], {}] for name in NUMBERS}
    wrong |= {name: [True, "8", 8.0, [8]] for name in INTEGERS}
    wrong |= {name: [1, 0, "true", "no", []] for name in ALLOWED[endpoint] if name in BOOLEANS}
    wrong |= {name: [1, "1", [True], ["1"], [1.0]] for name in ("stop_token_ids", "allowed_token_ids", "tokens")}
    wrong |= {"logit_bias": [{"5": "1"}, {"5": True}, {"5": 101}, {"5": -100.5}, [5]], "bad_words": ["x", [1]]}
    wrong |= {"logprobs": [1, "true"] if endpoint is CHAT else [True, "1"], "stop": [5, [5], {}]}
    wrong |= {"prompt": [5, [1, True], [1, "a"], [[1], [True]], [["a"]], {}]}
    for name, values in wrong.items():
        for value in values if name in ALLOWED[endpoint] else ():
            with pytest.raises(errors.InvalidRequestError) as caught:
                check(endpoint, **{name: value})
            assert caught.value.param == name, value


def test_the_numbers_above_are_those_of_openais_sdk() -> None:
    for endpoint in OPENAI_TYPES:
        for name in ALLOWED[endpoint] & OPENAI_FIELDS[endpoint].keys() - {"logprobs", "top_logprobs"}:
            kinds = {OPENAI_FIELDS[endpoint][name], *get_args(OPENAI_FIELDS[endpoint][name])}
            assert (float in kinds) == (name in NUMBERS), name
            assert (int in kinds) == (name in INTEGERS), name
            assert (name == "stream" or bool in kinds) == (name in BOOLEANS), name


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (CHAT, {"temperature": 1, "top_p": 1, "logit_bias": {"5": 1, "6": -0.5, "7": 100}, "n": 2, "logprobs": True}),
        (COMPLETION, {"prompt": [1, 2], "logprobs": 2, "stop": "x", "max_tokens": 5}),
        (COMPLETION, {"prompt": [[1], [2]], "stop": ["x"]}),
        (COMPLETION, {"prompt": ["a", "b"]}),
        (RESPONSES, {"max_output_tokens": 5, "temperature": 0}),
    ],
)
def test_an_integer_is_a_number_and_every_form_of_a_prompt_is_taken(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    assert check(endpoint, **fields) == {**MINIMAL[endpoint], **fields}


def test_no_field_is_both_allowed_everywhere_and_refused() -> None:
    for name in REFUSED:
        assert any(name not in allowed for allowed in ALLOWED.values()), name


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b'{"model": "m", "prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"model": "m", "prompt": "x", "temperature": 1e999}', "1e999 is too large"),
        (b'{"model": "m", "prompt": "x", "n": 1, "n": 2}', "repeats a key: 'n'"),
        (b'{"model": "m", "prompt": "\\ud800"}', "surrogate"),
        (b'{"model": "m", "prompt": "\xff"}', "utf-8"),
        (b'{"model": "m", "prompt": "x", "n": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_json_that_means_different_things_to_different_readers_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match=says) as caught:
        parse_body(raw, COMPLETION)
    assert caught.value.code == "invalid_json"
    json.dumps(caught.value.message).encode()
