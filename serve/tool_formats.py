"""How a base model writes tool calls, as its chat template shows it, and vLLM 0.32's name for the parser of that form.

A template renders the calls of earlier turns, so it holds the markup that the model was trained to write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The first of which every text stands in the template wins, so special forms come before general ones.
_FORMS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<seed:tool_call>",), "seed_oss"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<longcat_tool_call>",), "longcat"),
    (("<tool_call>", "<arg_key>"), "glm45"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<｜tool▁call▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁call▁begin｜>",), "deepseek_v31"),
    (("<|tool_call_start|>",), "lfm2"),
    (("<start_function_call>",), "functiongemma"),
    (("<|START_ACTION|>",), "cohere_command3"),
    (("<|action_start|>", "<|plugin|>"), "internlm"),
    (("<function_calls>",), "olmo3"),
    (("<|tool_call|>",), "granite"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|python_start|>",), "llama4_pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (("<tool_call>", "</tool_call>"), "hermes"),
)
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def tool_parser(model_path: Path, template_path: Path | None = None) -> tuple[str, str] | None:
    """The parser's name and the markup that it was recognised by; ``None`` where the form is not known.

    ``template_path``: a template that is used instead of the model's own.
    """
    template = _read_template(template_path) if template_path is not None else _model_template(model_path)
    if "tools" not in template:
        return None  # the model would never see the tools
    for texts, parser in _FORMS:
        if all(text in template for text in texts):
            return parser, texts[-1] if len(texts) > 1 and parser != "hermes" else texts[0]
    return None


def _model_template(model_path: Path) -> str:
    """All templates of the model in one text: some keep one for tools beside the usual one."""
    return "\n".join(filter(None, (_read_template(model_path / name) for name in _TEMPLATE_FILES)))


def _read_template(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
        return _template_in(json.loads(text)) if path.suffix == ".json" else text
    except (OSError, ValueError):
        return ""


def _template_in(settings: Any) -> str:
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(template, list):
        return "\n".join(str(entry.get("template", "")) for entry in template if isinstance(entry, dict))
    return template if isinstance(template, str) else ""
