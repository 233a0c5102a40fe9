"""A conversation in the terminal, over Capo's Python client."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from rich.console import Console

from capo.client import CapoClient, CapoClientError, ChatPiece, Message, Sampling, UnavailableError

_HELP = "/model NAME  /models  /reset  /quit; Ctrl-C stops an answer"

# A model's text must not move the cursor or retitle the window: control characters but newline and tab are left out.
_UNPRINTABLE = {code: None for code in (*range(32), 127, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}


@dataclass(slots=True)
class Pace:
    """How quickly an answer came, in seconds of ``time.monotonic()``."""

    asked_at: float
    first_token_at: float | None = None
    last_token_at: float | None = None
    num_tokens: int = 0

    def see(self, piece: ChatPiece) -> None:
        if piece.num_tokens:
            self.last_token_at = time.monotonic()
            self.num_tokens += piece.num_tokens
            if self.first_token_at is None:
                self.first_token_at = self.last_token_at

    def __str__(self) -> str:
        if self.first_token_at is None or self.last_token_at is None:
            return "no token came"
        parts = [f"{self.num_tokens} tokens", f"first after {self.first_token_at - self.asked_at:.2f} s"]
        if self.last_token_at > self.first_token_at:
            parts.append(f"{(self.num_tokens - 1) / (self.last_token_at - self.first_token_at):.1f} tokens/s")
        return ", ".join(parts)


class Conversation:
    """The turns so far, and the model that the next one goes to."""

    def __init__(self, client: CapoClient, model: str, sampling: Sampling, system: str | None) -> None:
        self.model = model
        self._client = client
        self._sampling = sampling
        self._system = [] if system is None else [Message("system", system)]
        self._turns: list[Message] = []

    def reset(self) -> None:
        """Forget every turn but the system's."""
        self._turns.clear()

    def ask(self, text: str, pace: Pace) -> Generator[ChatPiece, None, None]:
        """The answer as it comes. What was said of it stays in the conversation, however it ends; an answer of which
        nothing came leaves no trace of the question either.
        """
        question = Message("user", text)
        said: list[str] = []
        messages = [*self._system, *self._turns, question]
        try:
            for piece in self._client.chat_stream(self.model, messages, sampling=self._sampling):
                pace.see(piece)
                said.append(piece.text)
                yield piece
        finally:
            if answer := "".join(said):
                self._turns += [question, Message("assistant", answer)]


def answer_once(conversation: Conversation, text: str) -> None:
    """The answer alone on standard output."""
    for piece in conversation.ask(text, Pace(time.monotonic())):
        _write(piece.text)
    _write("\n")


def converse(client: CapoClient, conversation: Conversation) -> None:
    """Read, answer, and again, until the end of input or /quit."""
    import readline  # noqa: F401 - its import gives input() line editing and history

    console = Console(highlight=False, markup=False, emoji=False)
    _note(console, f"{conversation.model}. {_HELP}")
    for line in _lines():
        try:
            if line == "/quit":
                return
            if line.startswith("/"):
                _obey(line, client, conversation, console)
            else:
                _answer(line, conversation, console)
        except KeyboardInterrupt:
            _note(console, "\n(stopped)")
        except CapoClientError as error:
            console.print(f"\n{explain(error)}", style="red")


def explain(error: CapoClientError) -> str:
    """The error with what to do where nobody answers."""
    if isinstance(error, UnavailableError) and not error.code:
        return f"No Capo answers there ({error.message}). Start one with `capo serve`, or name another with --address."
    return error.message


def _lines() -> Iterator[str]:
    """What is typed, without empty lines. Ctrl-C at the prompt clears the line; Ctrl-D ends."""
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if line:
            yield line


def _obey(line: str, client: CapoClient, conversation: Conversation, console: Console) -> None:
    command, _, name = line.partition(" ")
    if command == "/model" and name:
        conversation.model = name.strip()
        _note(console, f"The next question goes to {conversation.model}.")
    elif command == "/models":
        for model in client.models():
            _note(console, f"{model.id} -> {model.revision}" if model.revision else f"{model.id} (base model)")
    elif command == "/reset":
        conversation.reset()
        _note(console, "Forgotten.")
    else:
        _note(console, f"There is no {command} like this. {_HELP}")


def _answer(text: str, conversation: Conversation, console: Console) -> None:
    pace = Pace(time.monotonic())
    for piece in conversation.ask(text, pace):
        if piece.reasoning:
            console.print(_printable(piece.reasoning), style="dim", end="")
        _write(_printable(piece.text))
    _write("\n")
    _note(console, str(pace))


def _note(console: Console, text: str) -> None:
    console.print(text, style="dim")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _printable(text: str) -> str:
    return text.translate(_UNPRINTABLE)
