"""What the engine's chat template and parsers can do, asked of vLLM 0.32 (:class:`serve.model_abilities.ModelAbilities`
says what follows from it).

A part of :mod:`serve.engine`; nothing else imports it.
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import State
from vllm import envs
from vllm.parser.abstract_parser import DelegatingParser

from serve.model_abilities import Messages, ModelAbilities, ToolParser


def abilities_of(tokenizer: Any, state: State, tool_parser: str | None) -> ModelAbilities:
    """``state`` holds vLLM's serving classes; ``tool_parser`` is the name of vLLM's, as it was given."""
    given = state.openai_serving_chat.chat_template

    def render(messages: Messages) -> str:
        return str(tokenizer.apply_chat_template(messages, chat_template=given, tokenize=False))

    return ModelAbilities(
        template=str(given or getattr(tokenizer, "chat_template", None)),
        render=render,
        tool_parser=_tool_parser_of(state, tool_parser),
    )


def reads_every_answer(parser: Any) -> bool:
    """Whether ``parser``, the class that vLLM gives chat answers to, takes something out of those without tools too."""
    if parser is None:
        return False
    # A parser of tool calls alone passes the text of a request without tools on unread, unless it is one of vLLM's
    # newer kind, which reads every answer.
    is_for_tools_alone = issubclass(parser, DelegatingParser) and parser.reasoning_parser_cls is None
    return not (is_for_tools_alone and not parser.tool_parser_cls.engine_based_streaming)


def _tool_parser_of(state: State, name: str | None) -> ToolParser | None:
    parser = state.openai_serving_chat.parser_cls
    if parser is None or (parser.tool_parser_cls is None and not state.online_renderer.use_harmony):
        return None
    # vllm/parser/abstract_parser.py makes a tag in the form of the tool parser; a parser of vLLM's that overrides that
    # binds its calls by itself.
    form = getattr(parser.tool_parser_cls, "structural_tag_model", None)
    binds_by_itself = (
        issubclass(parser, DelegatingParser)
        and parser._apply_structural_tag is not DelegatingParser._apply_structural_tag
    )
    binds = binds_by_itself or (form is not None and envs.VLLM_ENFORCE_STRICT_TOOL_CALLING)
    return ToolParser(str(name), binds_arguments=binds)


__all__ = ["abilities_of", "reads_every_answer"]
