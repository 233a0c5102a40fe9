"""What vLLM says when something goes wrong, as Capo's errors. Knows vLLM's wire format and none of its classes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from registry import errors
from serve.request_fields import ALLOWED

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_PATH = re.compile(r"(?:/[\w.@-]+){3,}")
_NATIVE_LOCATION = re.compile(r"\[[\d:]+\] \S+:\d+: ")
"""What C++ libraries put in front of a message: time, file and line."""

_PARAMETER = re.compile(r" \(parameter=.*\)$", re.DOTALL)
"""What vLLM's VLLMValidationError puts behind its message."""

# The ``parameter`` of vLLM's refusals of long prompts (vllm/renderers/params.py); no request has fields of these names.
_PROMPT_LENGTHS = ("input_tokens", "input_text")
# Who cuts a prompt and tries again knows OpenAI's words. vLLM's message has the older ones, "This model's maximum
# context length is ..."; these are the newer. litellm looks for either (its exception_mapping_utils.py), and
# langchain-openai 1.7 for the newer and for the code, which openai 3.52 no longer shows in str() of its exception.
_TOO_LONG = "Input tokens exceed the configured limit."


def engine_dead() -> errors.EngineDeadError:
    return errors.EngineDeadError(
        "The engine is not running; it is being restarted. Try again shortly.", retry_after_seconds=5
    )


def engine_reason(error: BaseException | str) -> str:
    """The last sentence of a vLLM error without paths or addresses."""
    _, _, reason = str(error).rpartition("failed: ")
    reason = _ADDRESS.sub("", _PATH.sub("...", _NATIVE_LOCATION.sub("", reason))).strip()
    return reason or type(error).__name__


def conversation_field(body: Mapping[str, Any]) -> str | None:
    """Of a client's body, where the conversation or the prompt stands."""
    return next((name for name in ("messages", "input", "prompt") if name in body), None)


def error_in_stream(chunk: str, conversation: str | None) -> errors.CapoError:
    return wire_error(json.loads(chunk.removeprefix("data: "))["error"], conversation)


def wire_error(error: Mapping[str, Any], conversation: str | None) -> errors.CapoError:
    """One of our errors for an error object that vLLM has already made; :func:`refused` has ``conversation``."""
    status, message, param = int(error["code"]), str(error["message"]), error.get("param")
    if status == 404:
        return errors.ModelNotFoundError(message, param="model")
    if status == 503:
        return errors.UnavailableError(message, code="queue_full", retry_after_seconds=1)
    if 400 <= status < 500 or status == 501:
        return refused(message, param, conversation)
    return errors.InternalError(message)


def refused(message: str, param: str | None, conversation: str | None) -> errors.InvalidRequestError:
    """A request that vLLM calls wrong. ``conversation``: :func:`conversation_field` of its body."""
    message = _PARAMETER.sub("", message)
    if param in _PROMPT_LENGTHS:
        return errors.InvalidRequestError(f"{message} {_TOO_LONG}", param=conversation, code="context_length_exceeded")
    return errors.InvalidRequestError(message, param=param or _field_named_first(message))


def _field_named_first(message: str) -> str | None:
    """Most of vLLM's refusals that do not give the field apart begin with its name."""
    word = message.partition(" ")[0].strip("`")
    return word if any(word in fields for fields in ALLOWED.values()) else None
