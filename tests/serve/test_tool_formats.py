"""The form of tool calls is recognised by the chat template; names and markup are held against vLLM's own parsers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from registry import locate_base_model
from serve.tool_formats import _FORMS, tool_parser

HERMES = "{% if tools %}{{ tools }}{% endif %}<tool_call>{{ call }}</tool_call>"


def write(folder: Path, template: str, name: str = "chat_template.jinja") -> Path:
    text = template if name.endswith(".jinja") else json.dumps({"chat_template": template})
    (folder / name).write_text(text)
    return folder


def test_the_embedded_model_writes_calls_as_hermes_does() -> None:
    assert tool_parser(locate_base_model("capo-tiny").path) == ("hermes", "<tool_call>")


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_template_is_found_wherever_a_model_keeps_it(tmp_path: Path, name: str) -> None:
    assert tool_parser(write(tmp_path, HERMES, name)) == ("hermes", "<tool_call>")


def test_a_template_for_tools_beside_the_usual_one_counts(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": HERMES}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert tool_parser(tmp_path) == ("hermes", "<tool_call>")


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("{{ tools }}<tool_call>\n<function={{ name }}>", "qwen3_coder"),
        ("{{ tools }}<tool_call>{{ name }}<arg_key>", "glm45"),
        ("{{ tools }}[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral"),
        ("{{ tools }}<|python_tag|>", "llama3_json"),
        ("{{ tools }}{{ call }}", None),
        ("<tool_call></tool_call>", None),
        ("", None),
    ],
)
def test_special_forms_win_over_general_ones_and_unknown_ones_are_none(
    tmp_path: Path, template: str, parser: str | None
) -> None:
    found = tool_parser(write(tmp_path, template))
    assert (found and found[0]) == parser


def test_a_template_that_the_user_gives_replaces_the_models(tmp_path: Path) -> None:
    other = tmp_path / "other.jinja"
    other.write_text("{{ tools }}[TOOL_CALLS]")
    assert tool_parser(write(tmp_path, HERMES), other) == ("mistral", "[TOOL_CALLS]")


@pytest.mark.parametrize(("texts", "parser"), _FORMS, ids=lambda value: str(value))
def test_vllm_has_the_parser_and_it_reads_this_markup(texts: tuple[str, ...], parser: str) -> None:
    import vllm
    from vllm.tool_parsers import ToolParserManager

    kind = ToolParserManager.get_tool_parser(parser)
    sources = [Path(inspect.getfile(base)) for base in kind.__mro__ if base.__module__.startswith("vllm.")]
    # Newer ones keep their markup in vllm/parser, in a file of the family's name.
    folder = Path(vllm.__file__).parent / "parser"
    names = (parser, sources[0].stem)
    sources += [path for path in folder.glob("*.py") if any(name.startswith(path.stem) for name in names)]
    source = "\n".join(path.read_text() for path in sources)
    assert any(text in source for text in texts), f"{parser} does not speak of {texts}"


def test_the_parsers_that_cannot_hold_strict_are_those_without_a_structural_tag() -> None:
    """By hand, from vLLM 0.32: cohere_command3 binds in a parser of its own, the others not at all."""
    from vllm.tool_parsers import ToolParserManager

    without = {name for _, name in _FORMS if ToolParserManager.get_tool_parser(name).structural_tag_model is None}
    assert without == {
        "cohere_command3", "functiongemma", "granite", "internlm", "lfm2", "llama4_pythonic", "mistral", "olmo3",
        "seed_oss",
    }  # fmt: skip
