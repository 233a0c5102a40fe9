"""What vLLM's parsers of tool calls say in the log of an answer that they cannot read: that max_tokens cut a call, or
the model wrote it wrong. The request succeeds, and its client gets the text; the service has no fault to mend.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass

from serve.engine_api import Call

_PARSERS = "vllm.tool_parsers."
_OF_WHAT_WAS_WRITTEN = (ValueError, LookupError, TypeError)
"""Raised on text that is no JSON, or JSON of another form."""


@dataclass(frozen=True, slots=True)
class WithoutUnreadCalls:
    """A filter of log records. A parser that fails otherwise, on an answer that was not cut, may be at fault itself."""

    current_call: ContextVar[Call | None]

    def filter(self, record: logging.LogRecord) -> bool:
        call = self.current_call.get()
        if call is None or not record.name.startswith(_PARSERS):
            return True
        error = record.exc_info[1] if record.exc_info else None
        return not ("length" in call.finish_reasons or isinstance(error, _OF_WHAT_WAS_WRITTEN))


def leave_out_unread_calls(current_call: ContextVar[Call | None]) -> None:
    """Of vLLM's log, from now on. Loggers do not ask the filters of those above them, but handlers ask their own."""
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(WithoutUnreadCalls(current_call))  # an equal one is not added again
