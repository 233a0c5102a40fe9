"""Trained spans against expectations written by hand, for four template families and for what must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from registry.errors import InvalidDataError, InvalidRequestError
from tests.tune.samples import CHATML, GEMMA, LLAMA3, MISTRAL, message
from tests.tune.spans import decode_spans
from tune.data.mask import ChatEncoder, Example, encode_text
from tune.data.rows import ChatRow, TextRow, parse_chat_row

TokenizerMaker = Callable[..., Any]

FAMILIES = {
    "chatml": (CHATML, "<|im_end|>", None),
    "llama3": (LLAMA3, "<|eot_id|>", "<|begin_of_text|>"),
    "mistral": (MISTRAL, "</s>", "<s>"),
    "gemma": (GEMMA, "<end_of_turn>", "<bos>"),
}


def row_of(*messages: dict[str, Any], **more: Any) -> ChatRow:
    return parse_chat_row(json.dumps({"messages": messages, **more}).encode(), line=7)


def encode(tokenizer: Any, row: ChatRow) -> list[Example]:
    return ChatEncoder(tokenizer).encode(row)


SINGLE = (message("user", "Hi there"), message("assistant", "Hello."))
MULTI = (*SINGLE, message("user", "Sure?"), message("assistant", "Yes, sure."))


@pytest.mark.parametrize(
    ("family", "messages", "spans"),
    [
        ("chatml", SINGLE, ["Hello.<|im_end|>"]),
        ("chatml", MULTI, ["Hello.<|im_end|>", "Yes, sure.<|im_end|>"]),
        ("chatml", (message("system", "Be kind."), *MULTI), ["Hello.<|im_end|>", "Yes, sure.<|im_end|>"]),
        ("chatml", (message("user", "a\n"), message("assistant", " b\n")), [" b\n<|im_end|>"]),
        ("llama3", SINGLE, ["Hello.<|eot_id|>"]),
        ("llama3", (message("system", "Be kind."), *MULTI), ["Hello.<|eot_id|>", "Yes, sure.<|eot_id|>"]),
        ("mistral", SINGLE, [" Hello.</s>"]),
        ("mistral", (message("system", "Be kind."), *MULTI), [" Hello.</s>", " Yes, sure.</s>"]),
        ("gemma", SINGLE, ["Hello.<end_of_turn>"]),
        ("gemma", MULTI, ["Hello.<end_of_turn>", "Yes, sure.<end_of_turn>"]),
    ],
)
def test_trained_spans_are_the_answers_with_their_end_of_turn(
    make_tokenizer: TokenizerMaker, family: str, messages: tuple[dict[str, Any], ...], spans: list[str]
) -> None:
    tokenizer = make_tokenizer(*FAMILIES[family])
    (example,) = encode(tokenizer, row_of(*messages))
    assert decode_spans(tokenizer, example) == spans


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_with_weight_0_is_read_but_not_trained(make_tokenizer: TokenizerMaker, family: str) -> None:
    tokenizer = make_tokenizer(*FAMILIES[family])
    first = message("assistant", "Hello.", weight=0)
    (example,) = encode(tokenizer, row_of(MULTI[0], first, *MULTI[2:]))
    (span,) = decode_spans(tokenizer, example)
    assert span.strip().startswith("Yes, sure.")
    assert "Hello." in tokenizer.decode(example.token_ids.tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_ids_are_exactly_those_that_serving_tokenises(make_tokenizer: TokenizerMaker, family: str) -> None:
    tokenizer = make_tokenizer(*FAMILIES[family])
    (example,) = encode(tokenizer, row_of(*MULTI))
    for end in (1, 3):
        prompt = tokenizer.apply_chat_template(list(MULTI[:end]), add_generation_prompt=True, return_dict=False)
        assert example.token_ids[: len(prompt)].tolist() == prompt
        assert example.trained[len(prompt)]
        assert not example.trained[len(prompt) - 1]


def test_tools_are_rendered_as_serving_renders_them(make_tokenizer: TokenizerMaker) -> None:
    template = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}" + CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}={{ c.function.arguments.x }}{% endfor %}",
    )
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"x": 5}'}}
    row = row_of(message("user", "go"), {"role": "assistant", "content": "now ", "tool_calls": [call]}, tools=[tool])
    tokenizer = make_tokenizer(template)
    (example,) = encode(tokenizer, row)
    assert decode_spans(tokenizer, example) == ["now look_up=5<|im_end|>"]
    assert tokenizer.decode(example.token_ids.tolist()).startswith("look_up;<|im_start|>user")


@pytest.mark.parametrize("what", ["tools", "tool_calls"])
def test_tools_that_the_template_leaves_out_are_refused(make_tokenizer: TokenizerMaker, what: str) -> None:
    template = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}" + CHATML
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "add_up", "arguments": "{}"}}
    row = row_of(message("user", "go"), {"role": "assistant", "content": "now", "tool_calls": [call]}, tools=[tool])
    tokenizer = make_tokenizer(CHATML if what == "tools" else template)
    with pytest.raises(InvalidDataError, match=rf"line 7: the chat template does not render the {what} \['"):
        encode(tokenizer, row)


NAMING = CHATML.replace("{{ m.role }}", "{{ m.role ~ (' ' ~ m.name if m.name else '') }}")


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_name_is_trained_where_the_template_shows_it_and_refused_where_it_does_not(
    make_tokenizer: TokenizerMaker, role: str
) -> None:
    """As serving refuses it: the tuned model could never be asked as it was trained."""
    messages = [message("system", "Be kind."), *MULTI]
    named = row_of(*({**each, "name": "Xenia"} if each["role"] == role else each for each in messages))
    with pytest.raises(InvalidDataError, match=rf"line 7: .*does not show the name of a message by '{role}'.*leave"):
        encode(make_tokenizer(CHATML), named)
    if role != "assistant":  # whose name the prompt would have to know beforehand
        tokenizer = make_tokenizer(NAMING)
        (example,) = encode(tokenizer, named)
        assert f"{role} Xenia" in tokenizer.decode(example.token_ids.tolist())


def test_a_name_may_repeat_the_role(make_tokenizer: TokenizerMaker) -> None:
    tokenizer = make_tokenizer(CHATML)
    named = row_of(*({**each, "name": each["role"]} for each in MULTI))
    assert [e.token_ids.tolist() for e in encode(tokenizer, named)] == [
        e.token_ids.tolist() for e in encode(tokenizer, row_of(*MULTI))
    ]


def test_a_tools_name_may_say_what_its_call_says_already(make_tokenizer: TokenizerMaker) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c }}{% endfor %}")
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    calling = {"role": "assistant", "content": "now", "tool_calls": [call]}
    answer = message("tool", "thing", tool_call_id="1")
    tokenizer = make_tokenizer(template)
    ids = [
        encode(tokenizer, row_of(MULTI[0], calling, {**answer, **name}, MULTI[1]))[0].token_ids.tolist()
        for name in ({}, {"name": "look_up"}, {"name": ""}, {"name": "tool"})
    ]
    assert ids[0] == ids[1] == ids[2] == ids[3]
    with pytest.raises(InvalidDataError, match="does not show the name of a message by 'tool'"):
        encode(tokenizer, row_of(MULTI[0], calling, {**answer, "name": "look_down"}, MULTI[1]))


def test_a_template_that_rewrites_earlier_turns_gives_one_example_for_each_turn(make_tokenizer: TokenizerMaker) -> None:
    """As Qwen3's does: only the last answer keeps its empty thinking block."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    first, second = encode(tokenizer, row_of(*MULTI))
    assert decode_spans(tokenizer, first) == ["<think></think>Hello.<|im_end|>"]
    assert decode_spans(tokenizer, second) == ["<think></think>Yes, sure.<|im_end|>"]
    assert "<think>" not in tokenizer.decode(second.token_ids.tolist()).split("Sure?")[0]


def test_a_token_across_the_border_is_cut_where_serving_cuts_it(make_tokenizer: TokenizerMaker) -> None:
    """``assistant: `` + ``The``: tokenised whole, the space would join the answer; serving sends it in the prompt."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(template)
    row = row_of(message("user", "What?"), message("assistant", "The door is red."))
    (example,) = encode(tokenizer, row)
    prompt = tokenizer("user: What?<|im_end|>assistant: ", add_special_tokens=False)["input_ids"]
    whole = tokenizer("user: What?<|im_end|>assistant: The door is red.<|im_end|>", add_special_tokens=False)
    assert whole["input_ids"][: len(prompt)] != prompt, "the case must be one in which the border matters"
    assert example.token_ids[: len(prompt)].tolist() == prompt
    assert decode_spans(tokenizer, example) == ["The door is red.<|im_end|>"]


def test_a_template_without_prefix_stability_is_refused_with_the_place(make_tokenizer: TokenizerMaker) -> None:
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>model\n{% endif %}")
    with pytest.raises(InvalidDataError, match=r"line 7: the chat template is not prefix-stable.*'assistant") as caught:
        encode(make_tokenizer(template), row_of(*SINGLE))
    assert caught.value.line == 7


def test_a_template_that_never_ends_a_turn_is_refused(make_tokenizer: TokenizerMaker) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(InvalidDataError, match="no end-of-turn token after messages"):
        encode(make_tokenizer(template), row_of(*SINGLE))


def test_a_template_that_drops_the_answer_is_refused(make_tokenizer: TokenizerMaker) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(InvalidDataError, match=r"renders nothing for messages\[1\]"):
        encode(make_tokenizer(template), row_of(*SINGLE))


def test_what_a_template_itself_refuses_is_reported_with_the_line(make_tokenizer: TokenizerMaker) -> None:
    tokenizer = make_tokenizer(*FAMILIES["gemma"])
    with pytest.raises(InvalidDataError, match=r"line 7: .*System role not supported"):
        encode(tokenizer, row_of(message("system", "Be kind."), *SINGLE))


def test_a_base_without_chat_template_is_refused(make_tokenizer: TokenizerMaker) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        ChatEncoder(make_tokenizer(None))


def test_text_is_cut_into_windows_that_lose_nothing_and_end_with_eos(tokenizer: Any) -> None:
    text = "The door is red. " * 20
    windows = encode_text(tokenizer, TextRow(line=1, text=text), max_length=32)
    ids = [int(i) for window in windows for i in window.token_ids]
    assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert all(len(window.token_ids) <= 32 for window in windows)
    assert all(not window.trained[0] and window.trained[1:].all() for window in windows)
