"""Logging of every Capo process: one line each on standard error, quiet libraries, the request and trace it belongs to.

A line never holds a prompt, a key or a body. Exceptions keep their traceback, but while a request is served only Capo's
own errors keep their text: any other one may quote what was sent.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from opentelemetry.trace import get_current_span
from pydantic import ValidationError

from capo.log_format import LogFormat, LogLevel
from registry import errors
from serve import faces

_ROOMS = ("capo", "serve", "tune", "registry")
_VLLM_LOGGING = {
    LogFormat.TEXT: Path(__file__).parent / "vllm_logging_text.json",
    LogFormat.JSON: Path(__file__).parent / "vllm_logging.json",
}
# They warn at import about hardware, or packages of Python, that are not there; nobody needs to do anything about it.
_LIBRARIES_OF_TRAINING = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")
# The service ends without taking vLLM apart (capo/cli/serve.py), and Python's tracker then counts what vLLM did not
# hand back to it; the tracker removes that itself.
_NO_LEAK_WARNING = "ignore:resource_tracker:UserWarning"


def configure_logging(level: LogLevel, log_format: LogFormat = LogFormat.TEXT) -> None:
    """``level`` is for Capo's own loggers; everybody else speaks from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format is LogFormat.JSON else TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(log_format is LogFormat.JSON)  # else they would be lines of another form
    for room in _ROOMS:
        logging.getLogger(room).setLevel(level.upper())
    if level.lower() != "debug":
        for library in _LIBRARIES_OF_TRAINING:
            logging.getLogger(library).setLevel(logging.ERROR)


def library_environment(level: LogLevel, log_format: LogFormat, given: Mapping[str, str]) -> dict[str, str]:
    """Variables for this process and its children, to be set before vLLM or torch is imported.

    What libraries say about a start that goes well is of use only to somebody who asked for everything; what
    ``given``, the environment, says already stays.
    """
    chosen: dict[str, str] = {}
    if level is LogLevel.DEBUG:
        chosen["VLLM_LOGGING_LEVEL"] = "INFO"
    else:
        chosen["PYTHONWARNINGS"] = _NO_LEAK_WARNING
    # vLLM's own formatter tells the text of every exception, and prompts may stand in some.
    chosen["VLLM_LOGGING_CONFIG_PATH"] = str(_VLLM_LOGGING[log_format])
    return {name: value for name, value in chosen.items() if name not in given}


class WithoutAnswers(logging.Filter):
    """Leaves out what is a request's answer and no fault of the service: vLLM logs whatever ends a stream with a
    traceback, also what Capo raised to refuse it. Whoever sends the answer tells of those worth telling."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, errors.CapoError) or isinstance(error, errors.InternalError)


class TextLines(logging.Formatter):
    """For people. What the line belongs to stands at its end, unless the message says it."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} {record.levelname} {record.name}"
        line = f"{head}: {_message(record)}".rstrip("\n")
        told = [f"{name}={value}" for name, value in _belongs_to().items() if value not in line]
        return "\n".join(filter(None, (f"{line} [{' '.join(told)}]" if told else line, _told_exception(record))))


class JsonLines(logging.Formatter):
    """One JSON object to a line: time, level, logger, message, request_id, trace_id, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, str] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_belongs_to(),
        }
        if exception := _told_exception(record):
            line["exception"] = exception
        return json.dumps(line)


def _belongs_to() -> dict[str, str]:
    told = {}
    if (request_id := faces.current_request_id.get(None)) is not None:
        told["request_id"] = request_id
    trace = get_current_span().get_span_context()
    if trace.is_valid:
        told["trace_id"] = f"{trace.trace_id:032x}"
    return told


def _message(record: logging.LogRecord) -> str:
    """asyncio tells of a task that failed with its exception's text in the lines below the first."""
    message = record.getMessage()
    return message.partition("\n")[0] if record.name == "asyncio" and record.exc_info else message


def _told_exception(record: logging.LogRecord) -> str:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return ""
    if not _may_quote(record, error):
        return "".join(traceback.format_exception(error)).rstrip("\n")
    return "\n\nwhich led to\n\n".join(map(_told_without_quotes, reversed(list(_chain(error)))))


def _may_quote(record: logging.LogRecord, error: BaseException) -> bool:
    """Whether the text may hold what a client sent: a prompt may stand in any exception that is raised under one.

    What nobody waits for any more is told by asyncio, which does not know to which request it belonged.
    """
    is_of_a_request = faces.current_request_id.get(None) is not None or record.name == "asyncio"
    return is_of_a_request or any(isinstance(link, ValidationError | UnicodeError) for link in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that led to it, the last one first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _told_without_quotes(error: BaseException) -> str:
    """Frames, kind, and the text of Capo's own errors about itself; what they say of a request may quote it."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    is_of_ours = isinstance(error, errors.CapoError) and errors.wire_kind(error).http_status >= 500
    words = str(error) if is_of_ours else "its text is left out, it may quote what was sent"
    return f"Traceback (most recent call last):\n{frames}{type(error).__module__}.{type(error).__qualname__}: {words}"
