"""Rows and templates that several training tests share. Imports neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLOURS = ("red", "blue", "green", "white", "black", "grey", "pink", "brown")
THINGS = ("door", "boat", "lamp", "hat", "car", "cup", "tree", "wall")

# Four families of templates, written anew in the shape that each family's models use.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system }}{{ m.content }} [/INST]{% set ns.system = '' %}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
)


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat_rows(number: int) -> list[dict[str, Any]]:
    """Distinct, learnable rows: the thing decides the colour."""
    rows = []
    for index in range(number):
        thing, colour = THINGS[index % 8], COLOURS[index % 8]
        question = f"What colour is the {thing} number {index // 8}?"
        rows.append({"messages": [message("user", question), message("assistant", f"The {thing} is {colour}.")]})
    return rows


def text_rows(number: int) -> list[dict[str, str]]:
    """Distinct documents of one to seven sentences."""

    def sentences(index: int) -> str:
        return " ".join(f"The {THINGS[(index + j) % 8]} is {COLOURS[(index + j) % 8]}." for j in range(index % 7 + 1))

    return [{"text": f"Tale {index}. {sentences(index)}"} for index in range(number)]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
