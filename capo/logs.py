"""Logging of every Capo process: one line each on standard error, quiet libraries, the request and trace it belongs to.

A line never holds a prompt, a key or a body. Exceptions keep their traceback, but the text of those that quote what
they were given is left out.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from opentelemetry.trace import get_current_span
from pydantic import ValidationError

from capo.log_format import LogFormat
from serve import faces

_ROOMS = ("capo", "serve", "tune", "registry")
_VLLM_JSON = Path(__file__).parent / "vllm_logging.json"
# The service ends without taking vLLM apart (capo/cli/serve.py), and Python's tracker then counts what vLLM did not
# hand back to it; the tracker removes that itself.
_NO_LEAK_WARNING = "ignore:resource_tracker:UserWarning"


def configure_logging(level: str, log_format: LogFormat = LogFormat.TEXT) -> None:
    """``level`` is for Capo's own loggers; everybody else speaks from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format is LogFormat.JSON else TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(log_format is LogFormat.JSON)  # else they would be lines of another form
    for room in _ROOMS:
        logging.getLogger(room).setLevel(level.upper())


def library_environment(level: str, log_format: LogFormat, given: Mapping[str, str]) -> dict[str, str]:
    """Variables for this process and its children, to be set before vLLM or torch is imported.

    What libraries say about a start that goes well is of use only to somebody who asked for everything; what
    ``given``, the environment, says already stays.
    """
    chosen: dict[str, str] = {}
    if level.lower() == "debug":
        chosen["VLLM_LOGGING_LEVEL"] = "INFO"
    else:
        chosen["PYTHONWARNINGS"] = _NO_LEAK_WARNING
    if log_format is LogFormat.JSON:
        chosen["VLLM_LOGGING_CONFIG_PATH"] = str(_VLLM_JSON)
    return {name: value for name, value in chosen.items() if name not in given}


class TextLines(logging.Formatter):
    """For people. What the line belongs to stands at its end, unless the message says it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # another handler's words on the exception, which would be taken over
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record).rstrip("\n")
        told = [f"{name}={value}" for name, value in _belongs_to().items() if value not in line]
        return f"{line} [{' '.join(told)}]" if told else line

    def formatException(self, ei: ExceptionInfo) -> str:
        return "" if ei[1] is None else _told_exception(ei[1])


class JsonLines(logging.Formatter):
    """One JSON object to a line: time, level, logger, message, request_id, trace_id, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, str] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_belongs_to(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = _told_exception(record.exc_info[1])
        return json.dumps(line)


ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def _belongs_to() -> dict[str, str]:
    told = {}
    if (request_id := faces.current_request_id.get(None)) is not None:
        told["request_id"] = request_id
    trace = get_current_span().get_span_context()
    if trace.is_valid:
        told["trace_id"] = f"{trace.trace_id:032x}"
    return told


def _told_exception(error: BaseException) -> str:
    if _quotes_its_input(error):
        frames = "".join(traceback.format_tb(error.__traceback__))
        return (
            f"Traceback (most recent call last):\n{frames}{type(error).__name__}: left out, it quotes what it was given"
        )
    return "".join(traceback.format_exception(error)).rstrip("\n")


def _quotes_its_input(error: BaseException) -> bool:
    """Whether a parser's or validator's words on a body are in it, or in what led to it."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ValidationError | UnicodeError):
            return True
        link = link.__cause__ or link.__context__
    return False
