"""Training renders what serving renders: the prompts of training against those of vLLM's own conversion.

The request goes through vLLM's models of it, its parser of messages and its renderer of templates, as a body of
/v1/chat/completions does; the row goes through the checks and the encoder of training.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import _detect_content_format, safe_apply_chat_template

from registry.errors import InvalidDataError
from tests.tune.samples import message
from tests.tune.test_mask_families import FAMILIES, TRL_TEMPLATES, WRITTEN, row_of, template_of, tokenizer_of
from tune.data.content_format import walks_over_parts
from tune.data.mask import ChatEncoder, Example

Messages = tuple[dict[str, Any], ...]
Tools = list[dict[str, Any]] | None

MODEL_CONFIG: Any = SimpleNamespace(
    multimodal_config=None,
    enable_prompt_embeds=False,
    trust_remote_code=False,
    hf_config=SimpleNamespace(model_type="llama"),
    allowed_local_media_path="",
    allowed_media_domains=None,
)
"""What vLLM's conversion of texts asks a model's configuration for."""

ASK, HELLO, SURE, YES = (
    message("user", "Hi"),
    message("assistant", "Hello."),
    message("user", "?"),
    message("assistant", "Yes."),
)
KIND, BRIEF = message("developer", "Be kind."), message("system", "Be brief.")
SCHEMA = {"type": "object", "properties": {"word": {"type": "string"}}}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def call(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": "look_up", "arguments": '{"word": "hat"}'}, **more}


LOOK_UP = tool(name="look_up", description="Looks a word up.", parameters=SCHEMA)
ANSWERED = message("tool", "A thing.", tool_call_id="call1abcd")
CALLING = {"role": "assistant", "content": None, "tool_calls": [call("call1abcd")]}

CASES: dict[str, tuple[Messages, Tools]] = {
    "two questions": ((ASK, HELLO, SURE, YES), None),
    "system": ((BRIEF, ASK, HELLO), None),
    "developer": ((KIND, ASK, HELLO, SURE, YES), None),
    "developer and tools": ((KIND, ASK, HELLO), [LOOK_UP]),
    "developer behind system": ((BRIEF, KIND, ASK, HELLO), None),
    "developer later": ((ASK, HELLO, KIND, SURE, YES), None),
    "system in parts, developer later": (({**BRIEF, "content": parts("a", "b")}, ASK, HELLO, KIND, SURE, YES), None),
    "system twice": ((BRIEF, BRIEF, ASK, HELLO), None),
    "system later": ((ASK, HELLO, BRIEF, SURE, YES), None),
    "a question in parts": (({**ASK, "content": parts("Hi", "there")}, HELLO), None),
    "an answer in parts": ((ASK, {**HELLO, "content": parts("Hello", "there.")}, SURE, YES), None),
    "an empty question": ((message("user", ""), HELLO), None),
    "two answers in a row": ((ASK, HELLO, YES), None),
    "reasoning that is read": ((ASK, {**HELLO, "reasoning": "A greeting.", "weight": 0}, SURE, YES), None),
    "reasoning by its older name": ((ASK, {**HELLO, "reasoning_content": "Hm.", "weight": 0}, SURE, YES), None),
    "reasoning before a call": (
        (ASK, {**CALLING, "reasoning": "Hm.", "weight": 0}, ANSWERED, HELLO, SURE, YES),
        [LOOK_UP],
    ),
    "a greeting first": (({**HELLO, "weight": 0}, ASK, YES), None),
    "an empty answer that is read": ((ASK, {**HELLO, "content": None, "weight": 0}, SURE, YES), None),
    "tool": ((ASK, HELLO), [LOOK_UP]),
    "tool without description": ((ASK, HELLO), [tool(name="look_up", parameters=SCHEMA)]),
    "tool without parameters": ((ASK, HELLO), [tool(name="look_up", description="Looks.", parameters=None)]),
    "tool with its keys in another order": ((ASK, HELLO), [tool(parameters=SCHEMA, description="L", name="look_up")]),
    "strict tool": ((ASK, HELLO), [tool(strict=True, name="look_up", description="Looks.", parameters=SCHEMA)]),
    "tool with strict null": ((ASK, HELLO), [tool(strict=None, name="look_up", description="L", parameters=SCHEMA)]),
    "call": ((ASK, CALLING, ANSWERED, HELLO), [LOOK_UP]),
    "call with a place in a stream": (
        (ASK, {**CALLING, "tool_calls": [call("call1abcd", index=0)]}, ANSWERED, HELLO),
        [LOOK_UP],
    ),
    "call with a text before it": ((ASK, {**CALLING, "content": "Let me see."}, ANSWERED, HELLO), [LOOK_UP]),
    "answer of a tool in parts": ((ASK, CALLING, {**ANSWERED, "content": parts("A", "thing.")}, HELLO), [LOOK_UP]),
    "answer of a tool by name": ((ASK, CALLING, {**ANSWERED, "name": "look_up"}, HELLO), [LOOK_UP]),
    "call without arguments": (
        (
            ASK,
            {**CALLING, "tool_calls": [{**call("call1abcd"), "function": {"name": "look_up", "arguments": ""}}]},
            ANSWERED,
            HELLO,
        ),
        [LOOK_UP],
    ),
}
TRAINS_TOOLS = {
    "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507", "lfm2", "glm4moe", "gptoss", "granite",
}  # fmt: skip
REFUSED = {
    "two answers in a row": {"gemma", "gemma3", "cohere", "cohere2", "qwen3"},
    "call with a text before it": {"gptoss"},
}
"""Where a template renders the prompt and then not its answer behind it."""


def served_prompt(tokenizer: Any, messages: Messages, tools: Tools) -> list[int]:
    said = [{key: value for key, value in each.items() if key != "weight"} for each in messages]
    body = {"model": "m", "messages": said} | ({"tools": tools} if tools else {})
    request = ChatCompletionRequest.model_validate(json.loads(json.dumps(body)))
    offered = [each.model_dump() for each in request.tools] if request.tools else None
    template = tokenizer.get_chat_template(tools=offered)
    form = _detect_content_format(template, default="string")
    conversation, _, _ = parse_chat_messages(list(request.messages), MODEL_CONFIG, form)
    options = request.build_chat_params(template, "auto").get_apply_chat_template_kwargs()
    prompt = safe_apply_chat_template(MODEL_CONFIG, tokenizer, conversation, tools=offered, **options)
    return list(prompt)


def served_prompts(tokenizer: Any, messages: Messages, tools: Tools) -> list[list[int]] | None:
    """Before each answer of weight 1; ``None`` where the template refuses one."""
    places = [i for i, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight", 1)]
    try:
        return [served_prompt(tokenizer, messages[:place], tools) for place in places]
    except VLLMValidationError:
        return None


def trained_examples(tokenizer: Any, messages: Messages, tools: Tools) -> list[Example] | None:
    """``None`` where training refuses the row."""
    try:
        return ChatEncoder(tokenizer).encode(row_of(*messages, **({"tools": tools} if tools else {})))
    except InvalidDataError:
        return None


def is_trained_behind(prompt: list[int], examples: list[Example]) -> bool:
    size = len(prompt)
    return any(each.token_ids[:size].tolist() == prompt and each.trained[size] for each in examples)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_renders_the_prompts_that_serving_renders(name: str) -> None:
    tokenizer = tokenizer_of(name, FAMILIES[name].eos)
    different, refused = [], set()
    should_be_refused = {case for case, names in REFUSED.items() if name in names}
    for case, (messages, tools) in CASES.items():
        prompts = served_prompts(tokenizer, messages, tools)
        if prompts is None or (tools and name not in TRAINS_TOOLS):
            should_be_refused.add(case)
        examples = trained_examples(tokenizer, messages, tools)
        if examples is None:
            refused.add(case)
        elif not all(is_trained_behind(prompt, examples) for prompt in prompts or []):
            different.append(case)
    assert different == []
    assert refused == should_be_refused
    assert {"two questions", "a question in parts", "an empty question"}.isdisjoint(refused)


WALKING = {
    "over a slice": "{% for m in messages %}{% for p in m.content[1:] %}{{ p.text }}{% endfor %}{% endfor %}",
    "over a filtered content": "{% for m in messages %}{% for p in m['content'] | list %}{% endfor %}{% endfor %}",
    "over another name": "{% set said = messages[1:] %}"
    "{% for m in said %}{% for p in m.content %}{% endfor %}{% endfor %}",
    "in a macro": "{% macro shown(it) %}{% for p in it %}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ shown(m.content) }}{% endfor %}",
    "in a macro, by name": "{% macro shown(it) %}{% for p in it %}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ shown(it=m.content) }}{% endfor %}",
    "in a macro of something else": "{% macro shown(content) %}{% for p in content %}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ m.content }}{{ shown(m.tool_calls) }}{% endfor %}",
    "over a variable content": "{% set content = messages[0].content %}{% for p in content %}{% endfor %}",
    "with two names": "{% for m in messages %}{% for k, v in m.content | items %}{% endfor %}{% endfor %}",
    "inside the tag of transformers": "{% for m in messages %}{% generation %}{% for p in m.content %}{% endfor %}"
    "{% endgeneration %}{% endfor %}",
    "with a break": "{% for m in messages %}{% for p in m.content %}{% break %}{% endfor %}{% endfor %}",
    "nothing": "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c }}{% endfor %}{% endfor %}",
    "not even Jinja": "{% for m in messages %}",
}


def test_templates_that_walk_over_parts_are_known_as_vllm_knows_them() -> None:
    templates = {name: template_of(name) for name in WRITTEN} | WALKING
    templates |= {path.stem: path.read_text("utf-8") for path in TRL_TEMPLATES.glob("*.jinja")}
    served = {name: _detect_content_format(text, default="string") == "openai" for name, text in templates.items()}
    assert {name: walks_over_parts(text) for name, text in templates.items()} == served
    assert set(served.values()) == {True, False}
