"""What a chat template or a parser of tool calls would ignore is refused; templates are rendered by jinja2 itself."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from registry import errors, locate_base_model
from serve.model_abilities import Messages, ModelAbilities, ToolParser

READS_NONE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
READS_ALL = "{% for m in messages %}{{ m['role'] }} {{ m.get('name', '') }}: {{ m['content'] }}\n{% endfor %}"
READS_TOOLS = """{% for m in messages %}{% if m.role == 'tool' %}{{ m.name }}{% endif %}{{ m.content }}
{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}{% endfor %}"""
TAKES_USERS_ONLY = "{% for m in messages %}{% if m.role != 'user' %}{{ error() }}{% endif %}{{ m.content }}{% endfor %}"

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
STRICT = {"type": "function", "function": {"name": "look", "strict": True}}
LAX = {"type": "function", "function": {"name": "look", "strict": False}}
BINDING, LOOSE = ToolParser("hermes", binds_arguments=True), ToolParser("lfm2", binds_arguments=False)


def abilities(template: str = READS_NONE, tool_parser: ToolParser | None = BINDING) -> ModelAbilities:
    compiled = jinja2.Environment(autoescape=False).from_string(template)  # noqa: S701 - a prompt is no page

    def render(messages: Messages) -> str:
        return compiled.render(messages=messages)

    return ModelAbilities(template=template, render=render, tool_parser=tool_parser)


def refusal(body: dict[str, Any], **options: Any) -> errors.InvalidRequestError:
    with pytest.raises(errors.InvalidRequestError) as caught:
        abilities(**options).check(body)
    return caught.value


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_a_name_that_the_template_never_reads_is_refused_and_one_that_it_reads_is_not(role: str) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": role, "content": "b", "name": "Ann"}]
    error = refusal({"messages": messages})
    assert (error.param, repr(role) in error.message) == ("messages.1.name", True)
    abilities(READS_ALL).check({"messages": messages})


def test_a_template_that_reads_the_names_of_some_roles_is_asked_for_each() -> None:
    asked = abilities(READS_TOOLS)
    asked.check({"messages": [{"role": "tool", "tool_call_id": "c1", "content": "b", "name": "anything"}]})
    with pytest.raises(errors.InvalidRequestError):
        asked.check({"messages": [{"role": "user", "content": "b", "name": "Ann"}]})


def test_a_tools_message_may_repeat_what_its_call_says() -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    answer = {"role": "tool", "tool_call_id": "c1", "content": "b"}
    for name in (None, "", "look"):
        abilities().check({"messages": [called, {**answer, "name": name}]})
    for wrong in ({**answer, "name": "listen"}, {**answer, "name": "look", "tool_call_id": "c2"}):
        assert refusal({"messages": [called, wrong]}).param == "messages.1.name"


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_a_name_that_repeats_the_role_may_stand_unread(role: str) -> None:
    """AutoGen's client names every user's message "user"."""
    message = {"role": role, "content": "b", "name": role}
    abilities().check({"messages": [message]})
    assert refusal({"messages": [{**message, "name": role.upper()}]}).param == "messages.0.name"


def test_the_embedded_model_sees_no_names() -> None:
    template = (locate_base_model("capo-tiny").path / "chat_template.jinja").read_text()
    assert refusal({"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, template=template)


def test_a_template_that_does_not_render_the_probe_judges_the_request_itself() -> None:
    asked = abilities(TAKES_USERS_ONLY)
    asked.check({"messages": [{"role": "assistant", "content": "b", "name": "Ann"}]})
    with pytest.raises(errors.InvalidRequestError):
        asked.check({"messages": [{"role": "user", "content": "b", "name": "Ann"}]})


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}, {"tool_choice": None}])
@pytest.mark.parametrize("flat", [False, True])
def test_strict_is_refused_where_the_parser_cannot_hold_it(choice: dict[str, Any], flat: bool) -> None:
    def tools(*given: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"type": "function", **tool["function"]} if flat else tool for tool in given]

    error = refusal({"tools": tools(LAX, STRICT), **choice}, tool_parser=LOOSE)
    assert error.code == "strict_not_supported"
    assert error.param == ("tools.1.strict" if flat else "tools.1.function.strict")
    assert "'lfm2'" in error.message
    abilities(tool_parser=LOOSE).check({"tools": tools(LAX), **choice})
    abilities(tool_parser=BINDING).check({"tools": tools(STRICT), **choice})


FORMATS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"choice": ["a"]}},
    {"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}},
]


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}, {"tool_choice": None}])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_format_beside_tools_is_refused_where_it_would_keep_them_from_being_called(
    choice: dict[str, Any], form: dict[str, Any]
) -> None:
    error = refusal({"tools": [LAX], **form, **choice}, tool_parser=LOOSE)
    assert (error.param, error.code, "'lfm2'" in error.message) == (next(iter(form)), "format_not_supported", True)
    abilities(tool_parser=BINDING).check({"tools": [LAX], **form, **choice})


def test_a_format_passes_beside_tools_that_may_not_be_called_and_what_is_no_format_beside_all() -> None:
    for body in (
        {"response_format": {"type": "json_object"}, "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"text": {}},
        {"text": {"verbosity": "medium"}},
        {"text": {"format": {"type": "text"}, "verbosity": None}},
    ):
        abilities(tool_parser=LOOSE).check({"tools": [LAX], **body})


def test_strict_passes_where_no_call_or_one_certain_call_is_asked_for() -> None:
    named = {"type": "function", "function": {"name": "look"}}
    for choice in ("none", "required", named):
        abilities(tool_parser=LOOSE).check({"tools": [STRICT], "tool_choice": choice})


def test_tools_are_refused_where_nothing_reads_calls_unless_none_may_be_made() -> None:
    assert refusal({"tools": [LAX]}, tool_parser=None).code == "tools_not_supported"
    abilities(tool_parser=None).check({"tools": [LAX], "tool_choice": "none"})


@pytest.mark.parametrize("body", [{"reasoning_effort": "low"}, {"reasoning": {"effort": "low"}}])
def test_an_effort_of_reasoning_that_the_template_has_no_switch_for_is_refused(body: dict[str, Any]) -> None:
    assert refusal(body).param == next(iter(body))
    abilities("{{ enable_thinking }}").check(body)
    abilities().check({"reasoning_effort": "none"})
