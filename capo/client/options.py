"""What a caller may ask for. A field that is ``None`` or empty is not sent, and takes the model's own default.

Bounds are the server's (proto/capo/v1/inference.proto says them); they are not checked twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function that the model has asked for."""

    id: str
    name: str
    arguments: str
    """JSON text, as the model wrote it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, developer, user, assistant or tool."""
    content: str | None = None
    """``None`` only in an assistant's turn with tool calls."""
    name: str | None = None
    tool_call_id: str | None = None
    """For role tool: the call that this is the result of."""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that satisfies a schema."""

    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that a regular expression matches as a whole."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these texts."""

    texts: Sequence[str]

    def __post_init__(self) -> None:
        _refuse_one_text("Choice.texts", self.texts)


@dataclass(frozen=True, slots=True)
class Grammar:
    """Text of a grammar."""

    ebnf: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen, for chat and completion alike."""

    max_tokens: int | None = None
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    """One or several; the answer ends before the first that comes."""
    stop_token_ids: Sequence[int] = ()
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """By token id."""
    min_tokens: int | None = None
    ignore_eos: bool = False
    structure: JsonSchema | JsonObject | Regex | Choice | Grammar | None = None
    """What the answer is made to look like."""
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    user: str | None = None

    def __post_init__(self) -> None:
        _refuse_one_text("bad_words", self.bad_words)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None


class ToolChoice(StrEnum):
    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class NamedTool:
    """As a tool choice: the model calls the tool of this name."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What belongs to chat alone."""

    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


def _refuse_one_text(name: str, texts: Sequence[str]) -> None:
    """A text is a sequence of texts, too: of its letters, which no type checker tells apart."""
    if isinstance(texts, str):
        raise TypeError(f"{name} is a list of texts, got the text {texts!r}. Send [{texts!r}].")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOptions:
    """What belongs to completions alone."""

    logprobs: int | None = None
    """So many of the likeliest tokens at each place; 0 gives the answer's own tokens alone."""
    echo: bool | None = None
    suffix: str | None = None
