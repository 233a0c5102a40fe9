"""What the server answers. The fields are those of proto/capo/v1; what was not sent is ``None`` or empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from capo.client.options import Message


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TopLogprob:
    token: str
    logprob: float
    bytes: bytes | None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: str
    logprob: float | None
    """``None`` for the first token of an echoed prompt."""
    bytes: bytes | None
    top: tuple[TopLogprob, ...]
    text_offset: int | None


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    logprob: float
    rank: int | None
    """1 is the likeliest token at its place."""
    decoded_token: str | None


PromptLogprobs = tuple[Mapping[int, PromptLogprob], ...]
"""For each place of a prompt: token ids and how likely they were; empty for the first place."""


@dataclass(frozen=True, slots=True)
class ChatChoice:
    index: int
    message: Message
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    """The stop string or token that ended it."""
    logprobs: tuple[TokenLogprob, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    id: str
    model: str
    """The exact revision that answered."""
    choices: tuple[ChatChoice, ...]
    usage: Usage
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: PromptLogprobs

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].message.content or ""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call; pieces with the same index belong together, and their arguments are joined."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """A piece of a chat answer. The last one of a stream has the usage and nothing else."""

    id: str
    model: str
    index: int
    text: str
    reasoning: str
    tool_calls: tuple[ToolCallDelta, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...]
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    index: int
    text: str
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: PromptLogprobs


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    id: str
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class CompletionPiece:
    """A piece of a completion. The last one of a stream has the usage and nothing else."""

    id: str
    model: str
    index: int
    text: str
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_token_ids: tuple[int, ...]
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Model:
    """A name that is meant to be called: the base model or an alias."""

    id: str
    revision: str | None
    """What it means now; ``None`` for the base model."""
    parent: str | None
    created_at: int
    """Unix seconds; 0 for the base model."""


@dataclass(frozen=True, slots=True)
class Adapter:
    name: str
    revision: str
    state: str
    """available, loading, loaded, draining or refused."""
    reason_code: str
    reason: str
    aliases: tuple[str, ...]
    canary_of: tuple[str, ...]
    rank: int
    created_at: int
    """Unix seconds."""
    requests_in_flight: int
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class Canary:
    """A second revision that answers some of a hundred requests of an alias."""

    revision: str
    percent: int


@dataclass(frozen=True, slots=True)
class Alias:
    alias: str
    revision: str
    write_once: bool
    updated_at: int
    """Unix seconds."""
    canary: Canary | None
