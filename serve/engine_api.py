"""The seam round the engine: what Capo needs from one, in Capo's own words.

:class:`serve.engine.VllmEngine` is the real one. Tests inject faults through a second implementation; what
both must keep is written down in tests/serve/engine_contract.py. Nothing on this side of the seam knows vLLM.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Endpoint(StrEnum):
    """Which OpenAI endpoint a call speaks."""

    CHAT = "chat"
    COMPLETION = "completion"
    RESPONSES = "responses"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"


@dataclass(frozen=True, slots=True)
class EngineAdapter:
    """One adapter as the engine knows it.

    ``engine_id`` is never used twice in a service's life, and ``name`` (a revision) and ``path`` never change their
    content: vLLM keys weights by id and prefix-cache blocks by name and path.
    """

    name: str
    engine_id: int
    path: Path


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the running engine can take; fixed when it starts."""

    max_loras: int
    """Adapter slots: how many adapters one step can mix, and so how many Capo keeps resident."""
    max_lora_rank: int
    max_model_len: int
    """Prompt and completion tokens together."""
    vocab_size: int


@dataclass(slots=True)
class Call:
    """One inference request on its way through the engine, and what was observed of it.

    The engine fills the lower half while it works; times are ``time.monotonic()`` seconds.
    """

    endpoint: Endpoint
    body: Mapping[str, Any]
    """OpenAI's request body after the request policy; its ``model`` is not read."""
    adapter: EngineAdapter | None
    """``None``: the base model. Set once the adapter is resident."""
    answer_model: str
    """The ``model`` that the answer names."""
    request_id: str
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    tenant: str = ""
    """Whose it is; where something is scarce, tenants take turns."""
    on_tokens: Callable[[float | None, int], None] | None = None
    """Called on the event loop whenever one of the answers got tokens: with the seconds since it got some before
    (``None``: these are its first), and how many are new."""

    created_at: float = field(default_factory=time.monotonic)
    checked_at: float | None = None
    """When the engine had said that it can do this; then it waits for its adapter."""
    adapter_at: float | None = None
    """When the adapter was there to be used; set with it."""
    first_token_at: float | None = None
    last_token_at_of: dict[Hashable, float] = field(default_factory=dict)
    """Of each answer: there are n to each prompt, and their tokens come in the same steps."""
    queued_seconds: float | None = None
    prompt_tokens: int = 0
    given_prompt_tokens: int = 0
    """Of the prompts that have come to the engine, read or not."""
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    was_in_engine: bool = False
    """It was handed to the engine, which may have died of it."""
    engine_records: list[Any] = field(default_factory=list)
    """The engine's own, one for each answer that it makes; nobody else reads them."""
    error: BaseException | None = None
    """What ended the generation early, before any wire format hid it."""

    def note_tokens(self, answer: Hashable, new_tokens: int) -> None:
        """Account tokens of one of the answers, which have just come; engines call it."""
        now = time.monotonic()
        self.completion_tokens += new_tokens
        if self.on_tokens is not None:
            before = self.last_token_at_of.get(answer)
            self.on_tokens(None if before is None else now - before, new_tokens)
        self.last_token_at_of[answer] = now

    @property
    def last_token_at(self) -> float | None:
        """Of all answers."""
        return max(self.last_token_at_of.values(), default=None)


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one of the n answers, without any wire format."""

    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    """The stop string or token that ended it."""


class Engine(ABC):
    """An inference engine with one base model and hot-swappable adapters.

    All coroutines run on one event loop. Methods raise :class:`registry.errors.CapoError` only.
    """

    @property
    @abstractmethod
    def limits(self) -> EngineLimits:
        """Valid once :meth:`start` has returned."""

    @property
    @abstractmethod
    def is_dead(self) -> bool:
        """True once the engine can no longer answer, until it is started again."""

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """Whether the engine owes somebody something; false while only a slow client keeps a call open."""

    @property
    @abstractmethod
    def last_progress_at(self) -> float:
        """``time.monotonic()`` of the last thing that the engine finished: a step, or an adapter that it loaded,
        refused or unloaded. Happens only while there is work."""

    @property
    def parses_chat(self) -> bool:
        """Whether a parser may change a chat answer even where no tools were given: :meth:`pieces` goes past it."""
        return False

    @abstractmethod
    async def kill(self) -> None:
        """End a hanging engine's processes at once, without asking. :attr:`is_dead` holds afterwards."""

    @abstractmethod
    async def start(self) -> None:
        """Bring the engine up; returns when it can answer. Does not block the event loop."""

    @abstractmethod
    async def stop(self, timeout_seconds: float) -> None:
        """End the engine and its processes. Requests still running end with an error."""

    @abstractmethod
    async def load_adapter(self, adapter: EngineAdapter) -> None:
        """Make ``adapter`` usable. On failure nothing of it stays behind.

        Raises:
            InvalidArtifactError: the engine refuses these weights.
        """

    @abstractmethod
    async def unload_adapter(self, adapter: EngineAdapter) -> None:
        """Free the adapter's device and host memory. The caller has made sure that nobody uses it."""

    @abstractmethod
    async def loaded_engine_ids(self) -> frozenset[int]:
        """The ids of the adapters that hold memory in the engine, as the engine itself counts them."""

    @abstractmethod
    async def check(self, call: Call) -> None:
        """Whether this engine and its base model can do what ``call`` asks for; may take seconds for a new constraint
        on the answer, so it comes before an adapter is held for the call. The three answers below count on it.

        Raises:
            InvalidRequestError: it cannot. UnavailableError: too much stands in line before it.
        """

    @abstractmethod
    async def complete(self, call: Call) -> bytes:
        """Answer in one piece: OpenAI's response object as JSON bytes."""

    @abstractmethod
    def stream(self, call: Call) -> AsyncGenerator[str, None]:
        """Answer as server-sent events, each with its blank line, as the endpoint has them.

        Chat and completion send ``data: {...}`` and end with ``data: [DONE]``; responses send ``event: ...`` as well
        and end with ``response.completed`` or ``response.incomplete``.

        Trouble is raised, never written into the stream: an abort or a crash cannot look like an end.
        Closing the iterator aborts the request in the engine.
        """

    @abstractmethod
    def pieces(self, call: Call) -> AsyncGenerator[Piece, None]:
        """Answer as bare text and tokens: the same rendering, sampling and limits as :meth:`stream`, no JSON.

        With ``body["stream"]`` as they come, else one piece for each answer. Raises and aborts like :meth:`stream`.
        """

    @abstractmethod
    async def convert_tokens(self, endpoint: Endpoint, body: Mapping[str, Any]) -> bytes:
        """Answer :attr:`Endpoint.TOKENIZE` or :attr:`Endpoint.DETOKENIZE` as JSON; no adapter changes the tokenizer."""

    @abstractmethod
    def body_schema(self, endpoint: Endpoint) -> dict[str, Any]:
        """JSON schema of the bodies that the engine takes, with all the fields it knows; ``$defs`` inside."""

    @abstractmethod
    async def generate_greedy(
        self, prompt_token_ids: list[int], *, max_tokens: int, adapter: EngineAdapter | None
    ) -> list[int]:
        """The greedy continuation, token ids only. For probes."""
