"""Training files as people write them: JSONL read as bytes, checked row by row, every fault with its line.

Chat rows follow OpenAI's fine-tuning format (openai.types.fine_tuning; platform guide "Supervised
fine-tuning"): ``messages``, ``tools``, ``parallel_tool_calls``. Text rows are ``{"text": ...}``. Files are
streamed; memory does not grow with them. Neither torch nor transformers is imported, so that the files API
can use this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from registry.errors import InvalidDataError, NotFoundError
from registry.strict_json import parse_strict_json
from tune.data.faults import RowFault, row_fault
from tune.data.messages import check_messages, check_tools, unknown_key_reason

JsonObject: TypeAlias = dict[str, Any]

MAX_LINE_BYTES = 10_000_000
"""A longer line is refused: about 2.5 million tokens, more than any context, and mostly a file without newlines."""

FEWEST_ROWS = 10
"""OpenAI's minimum for a training file (platform guide "Supervised fine-tuning"): a job refuses fewer, ``capo data``
warns."""

_UTF8_BOM = b"\xef\xbb\xbf"
_CHAT_KEYS = ("messages", "tools", "parallel_tool_calls")
_REFUSED_CHAT_KEYS = {
    "functions": "is the old form; write tools: [{type: function, function: {...}}] instead",
    "input": "belongs to preference rows (DPO); supervised rows hold messages",
    "text": "belongs to text rows, which stages of kind cpt read; supervised rows hold messages",
    "prompt": "is the old completion format; write messages with a user and an assistant turn instead",
    "completion": "is the old completion format; write messages with a user and an assistant turn instead",
}


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One conversation, in the form chat templates take."""

    line: int
    messages: tuple[JsonObject, ...]
    """``content`` is a string, or a list of text parts where there are several or none; ``weight`` is taken out."""
    trained: tuple[bool, ...]
    """Per message: an assistant message whose ``weight`` is not 0."""
    tools: tuple[JsonObject, ...] | None


@dataclass(frozen=True, slots=True)
class TextRow:
    """One document of running text."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class RowError:
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class FileReport:
    """What a check found. ``errors`` stops at the limit; ``rows`` counts the good rows up to there."""

    rows: int
    errors: tuple[RowError, ...]


def parse_chat_row(raw: bytes, line: int) -> ChatRow:
    """One line of a chat file, without its newline, to a row."""
    return check_chat_object(decode_object(raw, line), line)


def check_chat_object(row: JsonObject, line: int) -> ChatRow:
    """A decoded chat row, checked."""
    for key, value in row.items():
        if key in _REFUSED_CHAT_KEYS:
            if value is None or (key, value) == ("functions", []):
                continue  # asks for nothing; datasets writes null for a key that another row has
            raise row_fault(line, f"{key!r} {_REFUSED_CHAT_KEYS[key]}", "wrong_format", key)
        if key not in _CHAT_KEYS:
            raise row_fault(line, unknown_key_reason(key, _CHAT_KEYS), "unknown_key", key)
    if "messages" not in row:
        raise row_fault(line, "the row has no messages", "messages_shape", "messages")
    tools = check_tools(row.get("tools"), line)
    messages, trained = check_messages(row["messages"], line)
    _check_parallel_tool_calls(row, messages, line)
    return ChatRow(line=line, messages=messages, trained=trained, tools=tools)


def check_text_object(row: JsonObject, line: int) -> TextRow:
    """A decoded text row, checked."""
    for key in row:
        if key != "text":
            raise row_fault(line, unknown_key_reason(key, ("text",)), "unknown_key", key)
    text = row.get("text")
    if not isinstance(text, str):
        raise row_fault(line, f"text must be a string, got {type(text).__name__}", "content_type", "text")
    if not text.strip():
        raise row_fault(line, "text is empty", "empty_content", "text")
    return TextRow(line=line, text=text)


def check_rows(
    path: Path, parse: Callable[[bytes, int], object], limit_errors: int, *, max_rows: int | None = None
) -> FileReport:
    """Read the whole file with ``parse``, one row on each line, and report the first ``limit_errors`` faults.

    The first good row beyond ``max_rows`` is the last that is read.
    """
    rows = 0
    errors: list[RowError] = []
    with open_file(path) as file:
        for line, raw in read_lines(file):
            try:
                if isinstance(raw, RowFault):
                    raise raw
                parse(raw, line)
                rows += 1
                if max_rows is not None and rows > max_rows:
                    break
            except InvalidDataError as error:
                errors.append(RowError(line, error.message))
                if len(errors) >= limit_errors:
                    break
    if rows == 0 and not errors:
        errors.append(RowError(1, no_rows().message))
    return FileReport(rows=rows, errors=tuple(errors))


def open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFoundError(f"there is no data file at {path}", param="path") from error


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | RowFault]]:
    """Lines without their newline. Only ``\\n`` ends a line: U+2028 and friends are legal inside JSON strings.

    Blank lines at the end, which some editors and tools leave, are none.
    """
    line = 0
    first_blank: int | None = None
    while raw := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        if line == 1 and raw.startswith(_UTF8_BOM):
            raw = raw[len(_UTF8_BOM) :]
        if not raw.strip():
            first_blank = first_blank or line
            continue
        yield from ((blank, b"") for blank in range(first_blank or line, line))
        first_blank = None
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            _skip_rest_of_line(file)
            reason = f"longer than {MAX_LINE_BYTES} bytes; JSONL holds one row on each line"
            yield line, row_fault(line, reason, "too_long")
            continue
        yield line, raw.rstrip(b"\r\n")


def _skip_rest_of_line(file: BinaryIO) -> None:
    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        continue


def no_rows() -> RowFault:
    return row_fault(1, "the file holds no rows; JSONL needs one JSON object on each line", "no_rows")


def decode_object(raw: bytes, line: int) -> JsonObject:
    """Strict JSON: no NaN or infinity, no key given twice, nothing that cannot be written back as UTF-8."""
    if not raw.strip():
        raise row_fault(line, "the line is blank; remove it", "blank_line")
    try:
        value = parse_strict_json(raw)
    except UnicodeDecodeError as error:
        raise row_fault(line, f"not UTF-8 ({error.reason} at byte {error.start} of the line)", "not_utf8") from error
    except json.JSONDecodeError as error:
        raise row_fault(line, f"not valid JSON: {error.msg} at character {error.pos + 1}", "broken_json") from error
    except ValueError as error:
        raise row_fault(line, f"not valid JSON: {error}", "broken_json") from error
    if not isinstance(value, dict):
        raise row_fault(line, f"each line must be a JSON object, got {_json_type(value)}", "not_an_object")
    if b"\\u" in raw:  # only an escape can smuggle in half a surrogate pair, which no tokenizer can encode
        _refuse_lone_surrogates(value, line)
    return value


def _refuse_lone_surrogates(value: JsonObject, line: int) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise row_fault(line, "holds half a surrogate pair (\\ud800 to \\udfff)", "lone_surrogate") from error
    except RecursionError as error:
        raise row_fault(line, "nested too deeply", "broken_json") from error


def _check_parallel_tool_calls(row: JsonObject, messages: tuple[JsonObject, ...], line: int) -> None:
    """The key changes no token; it states something about the row, and that statement is held to."""
    allowed = row.get("parallel_tool_calls")
    if allowed is None:
        return
    if not isinstance(allowed, bool):
        reason = f"parallel_tool_calls must be true or false, got {_json_type(allowed)}"
        raise row_fault(line, reason, "parallel_tool_calls", "parallel_tool_calls")
    for index, message in enumerate(messages):
        if not allowed and len(message.get("tool_calls", ())) > 1:
            reason = f"parallel_tool_calls is false, but messages[{index}] makes {len(message['tool_calls'])} calls"
            raise row_fault(line, reason, "parallel_tool_calls", "parallel_tool_calls")


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
