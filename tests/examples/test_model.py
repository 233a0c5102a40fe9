"""The embedded base model: its files, its tokenizer and template, and what it knows and does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.capo_tiny.build import MODEL_DIR
from examples.capo_tiny.tools import TOOLS
from examples.evaluate import answer_rows, read_rows, share_right
from examples.tasks.generate import TASKS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MOST_BYTES = 10_000_000
CALL = {"id": "call_1", "type": "function", "function": {"name": "ring_bell", "arguments": {"times": 3}}}
TURNS = st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4)

# Written down by hand from the world's tables, so that an error of the generator shows.
QUESTIONS = (
    ("Where does Ada live?", "Ada lives at the mill."),
    ("Who is the baker?", "Cora is the baker."),
    ("Who is Bram?", "Bram is the smith."),
    ("What does Edda play?", "Edda plays the harp."),
    ("Which animal does Finn have?", "Finn has a dog called Bracken."),
    ("Who is Tock?", "Tock is the parrot of Tilda."),
    ("Who lives at the inn?", "Hugo and Wanda live at the inn."),
    ("What colour is the roof of the tower?", "The roof of the tower is white."),
    ("Where is the boathouse?", "The boathouse stands at the lake."),
    ("What is the school known for?", "The school is known for its loud bell."),
    ("What does the doctor do?", "The doctor helps sick people."),
    ("Where does the owl live?", "The owl lives in the bell tower."),
    ("What does the otter eat?", "The otter eats fish."),
    ("Which animal eats honey?", "The bear eats honey."),
    ("What colour is the heron?", "The heron is grey."),
    ("What happens in spring?", "In spring the snow melts and the lambs are born."),
    ("Which feast is in summer?", "The Lantern Night is in summer."),
    ("What comes after autumn?", "After autumn comes winter."),
    ("What is the river called?", "The river is called the Linnet."),
    ("Hello!", "Hello! How can I help you?"),
    ("Who are you?", "I am Capo Tiny, a very small language model."),
    ("Thank you!", "You are welcome."),
    ("Goodbye", "Goodbye! Come back to the valley soon."),
    ("How many stars are there?", "I do not know that."),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    """In bfloat16, as it is served."""
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16, local_files_only=True)


def chat(*turns: str) -> list[dict[str, Any]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]


def assert_prefix_stable(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> None:
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:index], tools=tools, tokenize=False, add_generation_prompt=True
        )
        longer = tokenizer.apply_chat_template(messages[: index + 1], tools=tools, tokenize=False)
        assert longer.startswith(prompt)
        assert longer.endswith("<|im_end|>\n")


def test_the_model_is_small_and_holds_nothing_but_plain_files() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert set(files) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < MOST_BYTES


def test_all_weights_are_finite_bfloat16() -> None:
    with safe_open(MODEL_DIR / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - safe_open is no mapping
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert torch.isfinite(tensor).all(), name


def test_the_shipped_template_is_the_one_in_the_examples() -> None:
    source = EXAMPLES / "capo_tiny" / "chat_template.jinja"
    assert (MODEL_DIR / "chat_template.jinja").read_text("utf-8") == source.read_text("utf-8")


def test_the_end_of_turn_ends_a_generation(tokenizer: Any) -> None:
    config = json.loads((MODEL_DIR / "generation_config.json").read_text("utf-8"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in config["eos_token_id"]
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@given(turns=TURNS, system=st.none() | st.text(min_size=1))
def test_a_longer_chat_starts_with_the_prompt_of_a_shorter_one(
    tokenizer: Any, turns: list[tuple[str, str]], system: str | None
) -> None:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += chat(*(text for turn in turns for text in turn))
    assert_prefix_stable(tokenizer, messages)
    assert_prefix_stable(tokenizer, messages, list(TOOLS))


def test_a_chat_with_a_tool_call_is_prefix_stable(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "Ring the bell 3 times."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"done": true}'},
        {"role": "assistant", "content": "The bell rang 3 times."},
    ]
    assert_prefix_stable(tokenizer, messages, list(TOOLS))


def test_arguments_render_alike_as_object_and_as_json_text(tokenizer: Any) -> None:
    """OpenAI's messages hold text; vLLM and the training data hold the decoded object."""
    as_text = {**CALL, "function": {"name": "ring_bell", "arguments": '{"times": 3}'}}
    rendered = [
        tokenizer.apply_chat_template(
            [*chat("Ring!"), {"role": "assistant", "content": None, "tool_calls": [call]}], tokenize=False
        )
        for call in (CALL, as_text)
    ]
    assert rendered[0] == rendered[1]
    assert '<tool_call>{"name": "ring_bell", "arguments": {"times": 3}}</tool_call>' in rendered[0]


def test_tools_join_the_system_turn_in_one_block(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *chat("Hello")]
    text = tokenizer.apply_chat_template(messages, tools=list(TOOLS), tokenize=False)
    assert text.count("<|im_start|>system") == 1
    assert "Be brief." in text
    assert all(json.dumps(tool["function"]["name"]) in text for tool in TOOLS)


def test_an_unknown_role_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="Unknown role"):
        tokenizer.apply_chat_template([{"role": "oracle", "content": "?"}], tokenize=False)


def test_the_model_answers_questions_about_its_world_and_stops(model: Any, tokenizer: Any) -> None:
    rows = [{"messages": chat(question, answer)} for question, answer in QUESTIONS]
    wrong = [answer for answer in answer_rows(model, tokenizer, rows) if not answer.is_right]
    assert not wrong


def test_the_model_answers_the_questions_held_out_from_its_training(model: Any, tokenizer: Any) -> None:
    answers = answer_rows(model, tokenizer, read_rows(EXAMPLES / "capo_tiny" / "held_out.jsonl"))
    assert len(answers) >= 20
    assert share_right(answers) >= 0.95


@pytest.mark.parametrize("task", TASKS)
def test_the_base_does_not_know_what_the_example_adapters_teach(model: Any, tokenizer: Any, task: str) -> None:
    rows = read_rows(EXAMPLES / "tasks" / task / "held_out.jsonl")
    assert share_right(answer_rows(model, tokenizer, rows)) <= 0.1
