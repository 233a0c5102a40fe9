"""One row under the glass: everything ``capo data check`` wants to know about it, as plain numbers and texts."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from tune.data.containers import RawRow
from tune.data.datafile import DataFile
from tune.data.duplicates import exact_print, signature
from tune.data.encode import NO_LIMIT, RowEncoder
from tune.data.faults import RowFault
from tune.data.formats import AnyRow
from tune.data.mask import Tokenizer
from tune.data.personal import find_personal_data, texts_of_row
from tune.data.preferences import PreferenceRow
from tune.data.rows import ChatRow, TextRow
from tune.data.served_form import joined_content

_CONTROL = frozenset(chr(i) for i in range(32) if chr(i) not in "\t\n\r\f")


@dataclass(slots=True)
class RowFacts:
    """Of one row. A faulty row has a fault and nothing else."""

    line: int
    fault: tuple[str, str] | None = None
    """(kind, reason)"""
    warnings: list[tuple[str, str]] = field(default_factory=list)
    """(kind, reason); the row can be trained on."""
    roles: tuple[str, ...] = ()
    """Of each message."""
    num_weight_0: int = 0
    """Assistant messages that are read but not trained."""
    num_tool_calls: int = 0
    has_tools: bool = False
    exact: int = 0
    signed: bytes | None = None
    personal: tuple[str, ...] = ()
    """Kinds of personal data in it."""
    tokens: int = 0
    """Of its longest example, of a text all; 0 without a tokenizer."""
    total_tokens: int = 0
    trained_tokens: int = 0
    kept_trained_tokens: int = 0
    """Trained tokens within the limit."""


class Examiner:
    """Looks at rows of one file. ``tokenizer`` is ``None`` where no base was named."""

    def __init__(self, file: DataFile, tokenizer: Tokenizer | None, max_tokens: int | None) -> None:
        self._file = file
        self._encoder = RowEncoder(tokenizer) if tokenizer is not None else None
        self._max_tokens = max_tokens
        self._special = _special_tokens(tokenizer) if tokenizer is not None else ()

    def __call__(self, chunk: list[tuple[int, RawRow]]) -> list[RowFacts]:
        return [self.facts(self._file.checked(raw, line), line) for line, raw in chunk]

    def facts(self, row: AnyRow | RowFault, line: int) -> RowFacts:
        if isinstance(row, RowFault):
            return RowFacts(line, fault=(row.kind, row.message))
        try:
            window_tokens = self._max_tokens or NO_LIMIT
            examples = self._encoder.encode(row, window_tokens=window_tokens) if self._encoder is not None else []
        except RowFault as fault:
            return RowFacts(line, fault=(fault.kind, fault.message))
        facts = RowFacts(line, exact=exact_print(row), signed=signature(row))
        for chat in _chats(row):
            _look_at_chat(chat, facts)
        texts = list(texts_of_row(row))
        facts.personal = tuple(sorted({one.kind for text in texts for one in find_personal_data(text)}))
        facts.warnings += _look_at_texts(texts, self._special)
        facts.total_tokens = sum(len(example.token_ids) for example in examples)
        longest = max((len(example.token_ids) for example in examples), default=0)
        facts.tokens = facts.total_tokens if isinstance(row, TextRow) else longest
        facts.trained_tokens = sum(example.num_trained for example in examples)
        limit = self._max_tokens if self._max_tokens is not None and not isinstance(row, TextRow) else NO_LIMIT
        facts.kept_trained_tokens = sum(int(example.trained[:limit].sum()) for example in examples)
        return facts


def _chats(row: AnyRow) -> tuple[ChatRow, ...]:
    if isinstance(row, TextRow):
        return ()
    return (row.chosen,) if isinstance(row, PreferenceRow) else (row,)


def _look_at_chat(row: ChatRow, facts: RowFacts) -> None:
    facts.roles = tuple(message["role"] for message in row.messages)
    facts.has_tools = row.tools is not None
    offered = {tool["function"]["name"] for tool in row.tools or ()}
    question = ""
    for index, message in enumerate(row.messages):
        content = joined_content(message["content"])
        if message["role"] == "user":
            question = content.strip()
        if message["role"] == "tool" and not content.strip():
            facts.warnings.append(("empty_tool_answer", f"messages[{index}] is a tool's answer without text"))
        if message["role"] != "assistant":
            continue
        facts.num_weight_0 += not row.trained[index]
        calls = message.get("tool_calls", ())
        facts.num_tool_calls += len(calls)
        unknown = sorted({call["function"]["name"] for call in calls} - offered)
        if unknown:
            facts.warnings.append(("undeclared_tool", f"messages[{index}] calls {unknown}, which tools does not list"))
        if question and content.strip() == question:
            facts.warnings.append(
                ("answer_repeats_question", f"messages[{index}] is what the user said, word for word")
            )


def _look_at_texts(texts: list[str], special: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for text in texts:
        if not text.isprintable() and not _CONTROL.isdisjoint(text):
            found = next(unicodedata.name(c, f"U+{ord(c):04X}") for c in text if c in _CONTROL)
            yield "control_character", f"a text holds the control character {found}"
        if "\N{REPLACEMENT CHARACTER}" in text:
            yield "damaged_text", "a text holds U+FFFD, the mark of characters that were lost"
        for token in special:
            if token in text:
                yield "special_token", f"a text holds the base's special token {token}, which is tokenised as such"


def _special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
