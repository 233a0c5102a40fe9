"""Trained spans for the chat templates of many model families, against spans written by hand.

Templates come from two places: those that TRL carries for its own tests of families, read when the test runs, and
some written here in the shape of families that TRL has none for. The tokenizer is capo-tiny's with each template's
special tokens added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl

from registry.errors import InvalidDataError
from tests.tune.samples import message
from tests.tune.spans import decode_spans
from tune.data.mask import ChatEncoder, Example
from tune.data.rows import ChatRow, parse_chat_row

CAPO_TINY = Path(__file__).resolve().parents[2] / "registry" / "models" / "capo-tiny"
TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = re.compile(
    r"<[|｜][^<>{}'\"\s]*?[|｜]>|<(?:start_of_turn|end_of_turn|turn\||\|turn|s|/s|end_of_utterance)>|\[/?[A-Z_]+\]"
)

ASK, HELLO = message("user", "Hi there"), message("assistant", "Hello.")
SURE, YES = message("user", "Sure?"), message("assistant", "Yes, sure.")
SYSTEM = message("system", "Be kind.")
CALL = {"id": "call1abcd", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "hat"}'}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
TOOL_TURNS = (
    ASK,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "thing", "tool_call_id": "call1abcd"},
    HELLO,
)

# Written anew in the families' formats.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL_V3 = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}"
    "{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ ns.system if loop.last or not tools else '' }}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
FALCON = (
    "{% for m in messages %}{% if not loop.first %}\n{% endif %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Falcon'}[m.role] }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}\nFalcon:{% endif %}"
)
GRANITE = (
    "{% if tools %}<|start_of_role|>tools<|end_of_role|>{{ tools | tojson }}<|end_of_text|>\n{% endif %}"
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>"
    "{% for c in m.tool_calls or [] %}<|tool_call|>{{ c.function | tojson }}{% endfor %}"
    "{{ m.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
# Edited ones: content trimmed and a date put in; the system text joined to the first question; reasoning dropped.
DATED = (
    "{% for m in messages %}{% if loop.first %}Today is {{ strftime_now('%d %b %Y') }}.\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGING = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% else %}"
    "<|im_start|>{{ m.role }}\n{{ ns.system }}{{ m.content }}<|im_end|>\n{% set ns.system = '' %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].strip() if m.role == 'assistant' and not loop.last else m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRITTEN = {
    "zephyr": ZEPHYR,
    "mistral_v3": MISTRAL_V3,
    "falcon": FALCON,
    "granite": GRANITE,
    "phi4": PHI4,
    "dated": DATED,
    "merging": MERGING,
    "forgetting": FORGETTING,
}


@dataclass(frozen=True)
class Family:
    """What a template makes of an answer: ``{}`` stands for its text."""

    trained: str
    eos: str
    takes_system: bool = True
    takes_tools: bool = True
    is_one_example: bool = True
    """Whether a chat of two answers is one example, or the template writes earlier turns otherwise."""
    call: str = "look_up"
    """Stands in the trained text of a tool call."""


NOTHING_THOUGHT = "<think>\n\n</think>\n\n{}<|im_end|>"
FAMILIES = {
    "llama3": Family("{}<|eot_id|>", "<|eot_id|>", takes_tools=False),
    "llama3_1": Family("{}<|eot_id|>", "<|eot_id|>"),
    "llama3_2": Family("{}<|eot_id|>", "<|eot_id|>"),
    "qwen2_5": Family("{}<|im_end|>", "<|im_end|>"),
    "qwen3": Family(NOTHING_THOUGHT, "<|im_end|>", is_one_example=False),
    "qwen3_instruct_2507": Family("{}<|im_end|>", "<|im_end|>"),
    "gemma": Family("{}<end_of_turn>", "<end_of_turn>", takes_system=False, takes_tools=False),
    "gemma3": Family("{}<end_of_turn>", "<end_of_turn>", takes_tools=False),
    "phi3": Family("{}<|end|>\n<|endoftext|>", "<|endoftext|>", takes_tools=False, is_one_example=False),
    "cohere": Family("{}<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", takes_tools=False),
    "cohere2": Family("{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", takes_tools=False),
    "lfm2": Family("{}<|im_end|>", "<|im_end|>", takes_tools=False),
    "glm4moe": Family("\n<think></think>\n{}<|user|>", "<|endoftext|>"),
    "gptoss": Family("<|channel|>final<|message|>{}<|return|>", "<|return|>", takes_tools=False, is_one_example=False),
    "zephyr": Family("{}</s>", "</s>", takes_tools=False),
    "mistral_v3": Family(" {}</s>", "</s>", takes_tools=False),
    "falcon": Family(" {}<|endoftext|>", "<|endoftext|>", takes_tools=False),
    "granite": Family("{}<|end_of_text|>", "<|end_of_text|>"),
    "phi4": Family("{}<|im_end|>", "<|im_end|>", takes_tools=False),
    "dated": Family("{}<|im_end|>", "<|im_end|>", takes_tools=False),
    "merging": Family("{}<|im_end|>", "<|im_end|>", takes_tools=False),
    "forgetting": Family("{}<|im_end|>", "<|im_end|>", takes_tools=False),
}
OF_TRL = [name for name in FAMILIES if name not in WRITTEN]


@cache
def template_of(name: str) -> str:
    return WRITTEN[name] if name in WRITTEN else (TRL_TEMPLATES / f"{name}.jinja").read_text("utf-8")


@cache
def tokenizer_of(name: str, eos: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CAPO_TINY)
    special = [*SPECIAL.findall(template_of(name)), eos, "<s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*special, "<|user|>", "<|observation|>"})})
    tokenizer.add_special_tokens({"eos_token": eos, "bos_token": "<s>"})
    tokenizer.chat_template = template_of(name)
    return tokenizer


def row_of(*messages: dict[str, Any], **more: Any) -> ChatRow:
    return parse_chat_row(json.dumps({"messages": messages, **more}).encode(), line=7)


def spans(name: str, *messages: dict[str, Any], **more: Any) -> list[list[str]]:
    """Of each example the trained texts."""
    tokenizer = tokenizer_of(name, FAMILIES[name].eos)
    return [decode_spans(tokenizer, example) for example in ChatEncoder(tokenizer).encode(row_of(*messages, **more))]


def expected(name: str, *answers: str) -> list[list[str]]:
    family = FAMILIES[name]
    texts = [family.trained.replace("{}", answer) for answer in answers]
    return [texts] if family.is_one_example else [[text] for text in texts]


def test_there_are_at_least_twelve_families_and_three_edited_templates() -> None:
    assert len(OF_TRL) >= 12
    assert {"dated", "merging", "forgetting"} <= FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_one_answer_and_its_end_of_turn_are_trained(name: str) -> None:
    assert spans(name, ASK, HELLO) == expected(name, "Hello.")


@pytest.mark.parametrize("name", FAMILIES)
def test_all_answers_of_a_chat_are_trained(name: str) -> None:
    assert spans(name, ASK, HELLO, SURE, YES) == expected(name, "Hello.", "Yes, sure.")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.takes_system])
def test_a_system_message_is_read_and_not_trained(name: str) -> None:
    assert spans(name, SYSTEM, ASK, HELLO, SURE, YES) == expected(name, "Hello.", "Yes, sure.")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_of_weight_0_is_read_and_not_trained(name: str) -> None:
    first, last = ({**HELLO, "weight": 0}, YES), (HELLO, {**YES, "weight": 0})
    assert spans(name, ASK, first[0], SURE, first[1]) == expected(name, "Yes, sure.")
    assert spans(name, ASK, last[0], SURE, last[1]) == expected(name, "Hello.")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.takes_tools])
def test_a_tool_call_is_trained_and_the_tools_answer_is_not(name: str) -> None:
    examples = spans(name, *TOOL_TURNS, tools=[TOOL])
    called, answered = (text for texts in examples for text in texts)
    assert "look_up" in called
    assert "hat" in called
    assert "thing" not in called + answered
    assert answered.rstrip().endswith(FAMILIES[name].trained.partition("{}")[2])
    assert "Hello." in answered
    tokenizer = tokenizer_of(name, FAMILIES[name].eos)
    whole = ChatEncoder(tokenizer).encode(row_of(*TOOL_TURNS, tools=[TOOL]))[-1]
    assert "thing" in tokenizer.decode(whole.token_ids.tolist()), "the tool's answer is read"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trained_span_begins_where_serving_stops_the_prompt(name: str) -> None:
    """Independent of the encoder: the prompt as serving tokenises it, compared id by id."""
    tokenizer = tokenizer_of(name, FAMILIES[name].eos)
    examples: list[Example] = ChatEncoder(tokenizer).encode(row_of(ASK, HELLO, SURE, YES))
    for prefix in ([ASK], [ASK, HELLO, SURE]):
        prompt = tokenizer.apply_chat_template(prefix, add_generation_prompt=True, return_dict=False)
        assert any(
            example.token_ids[: len(prompt)].tolist() == prompt
            and example.trained[len(prompt)]
            and not example.trained[len(prompt) - 1]
            for example in examples
        )


LATER = {
    "a system message later": (ASK, HELLO, SYSTEM, SURE, YES),
    "a developer message later": (ASK, HELLO, {**SYSTEM, "role": "developer"}, SURE, YES),
    "two answers in a row": (ASK, HELLO, YES),
}
ALTERNATES = {"gemma", "gemma3", "cohere"}
REFUSES = {
    "a system message later": ALTERNATES,
    "a developer message later": {"gemma"},
    "two answers in a row": {*ALTERNATES, "cohere2", "qwen3"},
}
"""Families whose template wants other roles there, or renders the first answer otherwise when a second follows."""


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("order", LATER)
def test_whatever_order_of_roles_a_template_renders_the_answers_alone_are_trained(order: str, name: str) -> None:
    if name in REFUSES[order]:
        with pytest.raises(InvalidDataError, match="line 7: the chat template "):
            spans(name, *LATER[order])
        return
    trained = [text for texts in spans(name, *LATER[order]) for text in texts]
    both = [FAMILIES[name].trained.replace("{}", answer) for answer in ("Hello.", "Yes, sure.")]
    assert trained in (both, ["".join(both)])  # one span, where nothing stands between two answers


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - ALTERNATES - {"cohere2"}))
def test_a_greeting_of_weight_0_is_read_and_not_trained(name: str) -> None:
    assert spans(name, {**HELLO, "weight": 0}, SURE, YES) == expected(name, "Yes, sure.")


def test_a_family_without_system_messages_says_so() -> None:
    with pytest.raises(InvalidDataError, match="line 7: the chat template refuses messages"):
        spans("gemma", SYSTEM, ASK, HELLO)


def test_what_the_template_trims_is_not_trained() -> None:
    assert spans("dated", ASK, message("assistant", "  Hello. \n")) == [["Hello.<|im_end|>"]]
    assert spans("llama3_1", ASK, message("assistant", "  Hello. \n")) == [["Hello.<|eot_id|>"]]


THOUGHT = message("assistant", "<think>\nA greeting.\n</think>\n\nHello.")


@pytest.mark.parametrize("name", ["qwen3", "forgetting"])
def test_reasoning_is_trained_where_it_is_shown_and_gone_from_earlier_turns(name: str) -> None:
    tokenizer = tokenizer_of(name, FAMILIES[name].eos)
    examples = ChatEncoder(tokenizer).encode(row_of(ASK, THOUGHT, SURE, {**THOUGHT, "content": THOUGHT["content"]}))
    assert [decode_spans(tokenizer, example) for example in examples] == [
        ["<think>\nA greeting.\n</think>\n\nHello.<|im_end|>"],
        ["<think>\nA greeting.\n</think>\n\nHello.<|im_end|>"],
    ]
    assert tokenizer.decode(examples[1].token_ids.tolist()).count("A greeting.") == 1


@pytest.mark.parametrize("name", ["qwen3", "glm4moe"])
def test_reasoning_in_a_field_of_its_own_is_trained_as_the_template_writes_it(name: str) -> None:
    thinking = {**HELLO, "reasoning": "A greeting."}
    (texts,) = spans(name, ASK, thinking)
    (inline,) = spans(name, ASK, THOUGHT)
    assert texts == inline
    assert "A greeting." in texts[0]


@pytest.mark.parametrize("name", ["llama3_1", "forgetting", "gptoss", "deepseek_r1_distill"])
def test_reasoning_that_the_template_leaves_out_is_refused(name: str) -> None:
    tokenizer = tokenizer_of(name, "<｜end▁of▁sentence｜>" if "deepseek" in name else FAMILIES[name].eos)
    with pytest.raises(InvalidDataError, match=r"<think>\.\.\.</think>"):
        ChatEncoder(tokenizer).encode(row_of(ASK, {**HELLO, "reasoning": "A greeting."}))


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_a_template_that_cuts_the_reasoning_out_trains_what_the_row_has(name: str) -> None:
    """Its prompt opens the reasoning, so the answer begins inside of it."""
    tokenizer = tokenizer_of(name, "<｜end▁of▁sentence｜>")
    (example,) = ChatEncoder(tokenizer).encode(row_of(ASK, THOUGHT))
    assert decode_spans(tokenizer, example) == ["A greeting.\n</think>\n\nHello.<｜end▁of▁sentence｜>"]
    prompt = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, return_dict=False)
    assert example.token_ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "nemotron_3_nano"])
def test_an_answer_without_the_reasoning_that_the_prompt_opens_is_refused(name: str) -> None:
    tokenizer = tokenizer_of(name, "<|im_end|>" if "nemotron" in name else "<｜end▁of▁sentence｜>")
    with pytest.raises(InvalidDataError, match=r"so begin the answer with its own: <think>\.\.\.</think>"):
        ChatEncoder(tokenizer).encode(row_of(ASK, HELLO))


def test_where_the_next_turns_token_ends_a_turn_it_is_trained_also_after_reasoning() -> None:
    (texts,) = spans("glm4moe", ASK, THOUGHT)
    assert texts == ["\n<think>A greeting.</think>\nHello.<|user|>"]


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "renders no prompt": (
        lambda _: "{% for m in messages if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}",
        "renders nothing before messages",
    ),
    "leaves the answer out": (
        lambda _: "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
        "renders nothing for messages",
    ),
    "ends no turn": (lambda text: text.replace("<|im_end|>", ""), "no end-of-turn token"),
    "prompts for somebody else": (
        lambda text: text.replace(
            "<|im_start|>assistant<|im_sep|>{% endif %}", "<|im_start|>model<|im_sep|>{% endif %}"
        ),
        "not prefix-stable",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_training_on_all_or_on_nothing_by_mistake_is_refused(how: str) -> None:
    edit, reason = BROKEN[how]
    tokenizer = tokenizer_of("phi4", "<|im_end|>")
    original = tokenizer.chat_template
    tokenizer.chat_template = edit(original)
    try:
        with pytest.raises(InvalidDataError, match=f"line 7: .*{reason}"):
            ChatEncoder(tokenizer).encode(row_of(ASK, HELLO))
    finally:
        tokenizer.chat_template = original
