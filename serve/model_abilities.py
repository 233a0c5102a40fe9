"""What the base model's chat template and its parser of tool calls can do with a request.

vLLM takes a field that the template never reads, or a promise that the parser cannot keep, and ignores it. Here it is
refused, by name. The template is asked by rendering it: where a probe looks the same with and without a name, the model
never sees names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from registry import errors
from serve.request_shapes import asks_for_a_format

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]

_CALL = {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": {}}}
_QUESTION = {"role": "user", "content": "a"}


@dataclass(frozen=True, slots=True)
class ToolParser:
    """What reads tool calls out of answers."""

    name: str
    """vLLM's."""
    binds_arguments: bool
    """Whether a call that the model chose to make can be bound to the schema of a strict tool (vLLM's structural
    tags), and so be chosen beside a format."""


class ModelAbilities:
    """Of one engine, for as long as it lives. ``render`` is the chat template itself: messages to the prompt's text."""

    def __init__(self, *, template: str, render: Callable[[Messages], str], tool_parser: ToolParser | None) -> None:
        self._template = template
        self._render = render
        self._tool_parser = tool_parser
        self._reads_name: dict[str, bool] = {}

    def check(self, body: Mapping[str, Any]) -> None:
        """Whether the model can do what ``body`` asks for.

        Raises:
            InvalidRequestError: it cannot, and would ignore it.
        """
        self._check_tools(body)
        effort = body.get("reasoning_effort") or (body.get("reasoning") or {}).get("effort")
        if effort not in (None, "none") and not self._template_mentions("reasoning_effort", "enable_thinking"):
            raise errors.InvalidRequestError(
                "The chat template of this base model has no switch for the effort of reasoning. Leave it out.",
                param="reasoning_effort" if "reasoning_effort" in body else "reasoning",
            )
        self.check_names(body)

    def check_names(self, body: Mapping[str, Any]) -> None:
        """Whether the model sees the names in ``messages``. A name may stand there unread if it says nothing new: which
        tool a message answers for is said by the call's id too, and some clients repeat the role.

        Raises:
            InvalidRequestError: it does not see one.
        """
        called: dict[str, str] = {}
        messages = body.get("messages")
        for number, message in enumerate(messages if isinstance(messages, list) else []):
            role, name = message["role"], message.get("name")
            called |= _called(message)
            known = {role, called.get(_call_id(message))} if role == "tool" else {role}
            if not name or name in known:
                continue
            if role not in self._reads_name:
                self._reads_name[role] = self._looks_different_with_a_name(role)
            if not self._reads_name[role]:
                raise errors.InvalidRequestError(
                    f"The chat template of this base model does not show it the name of a message by {role!r}. Leave "
                    "the name out, or say it in the content.",
                    param=f"messages.{number}.name",
                )

    def _check_tools(self, body: Mapping[str, Any]) -> None:
        tools, choice = body.get("tools"), body.get("tool_choice")
        if not tools or choice == "none":
            return
        if self._tool_parser is None:
            raise errors.InvalidRequestError(
                "How this base model writes tool calls is not known. Start the service with: capo serve -- "
                "--enable-auto-tool-choice --tool-call-parser NAME (vLLM's documentation of tool calling lists them).",
                param="tools",
                code="tools_not_supported",
            )
        if choice not in (None, "auto") or self._tool_parser.binds_arguments:
            return
        for name in ("response_format", "structured_outputs", "text"):
            if asks_for_a_format(body.get(name)):
                raise errors.InvalidRequestError(
                    f"{name} would keep the tools from ever being called: this base model's tool calls are read by the "
                    f"parser {self._tool_parser.name!r}, which cannot offer the choice between a call and a format. "
                    "Leave the format out until the tools have answered, or send tool_choice none.",
                    param=name,
                    code="format_not_supported",
                )
        for number, tool in enumerate(tools if isinstance(tools, list) else []):
            if tool.get("function", tool).get("strict"):
                raise errors.InvalidRequestError(
                    f"strict cannot be held with tool_choice auto: this base model's tool calls are read by the parser "
                    f"{self._tool_parser.name!r}, which does not bind them to a schema while they are written. Leave "
                    "strict out and check the arguments, or name the tool in tool_choice.",
                    param=f"tools.{number}.function.strict" if "function" in tool else f"tools.{number}.strict",
                    code="strict_not_supported",
                )

    def _template_mentions(self, *names: str) -> bool:
        return any(name in self._template for name in names)

    def _looks_different_with_a_name(self, role: str) -> bool:
        """A template that does not render the probe is left to judge the request itself."""
        turn: dict[str, Any] = {"role": role, "content": "b"}
        before: Messages = []
        if role == "tool":
            turn["tool_call_id"] = _CALL["id"]
            before = [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
        elif role == "assistant":
            before = [_QUESTION]
        after = [] if role == "user" else [_QUESTION]
        try:
            return self._render([*before, {**turn, "name": "Xenia"}, *after]) != self._render([*before, turn, *after])
        except Exception as error:  # a template may raise anything
            logger.info("the chat template did not render a probe of role %s: %s", role, error)
            return True


def _called(message: Mapping[str, Any]) -> dict[str, str]:
    """The names of the functions that an assistant's message calls, by the calls' ids."""
    calls = message.get("tool_calls")
    return {
        _text(call.get("id")): _text(call["function"].get("name"))
        for call in (calls if isinstance(calls, list) else [])
        if isinstance(call, dict) and isinstance(call.get("function"), dict)
    }


def _call_id(message: Mapping[str, Any]) -> str:
    return _text(message.get("tool_call_id"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
