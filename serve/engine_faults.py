"""What vLLM 0.32 raises, as Capo's errors; :mod:`serve.engine_errors` knows what it says.

A part of :mod:`serve.engine`; nothing else imports it.
"""

from __future__ import annotations

import logging

from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMNotFoundError
from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError
from vllm.v1.engine.exceptions import EngineGenerateError

from registry import errors
from serve.engine_errors import engine_dead, engine_reason, refused

logger = logging.getLogger(__name__)


def translated(error: BaseException, *, engine_is_dead: bool, conversation: str | None) -> errors.CapoError:
    """Unknown server faults keep their text to the log. ``conversation``: its field in the client's body, if any."""
    if isinstance(error, errors.CapoError):
        return error
    if isinstance(error, EngineGenerateError) and error.__cause__ is not None:
        return translated(error.__cause__, engine_is_dead=engine_is_dead, conversation=conversation)
    if isinstance(error, VllmEngineDeadError) or engine_is_dead:
        return engine_dead()
    if isinstance(error, VLLMNotFoundError):
        return errors.ModelNotFoundError(str(error), param="model")
    if isinstance(error, GracefulHTTPError):
        return errors.UnavailableError(
            "The engine's queue is full. Try again shortly.", code="queue_full", retry_after_seconds=1
        )
    if (reason := _template_error(error)) is not None:
        return errors.InvalidRequestError(f"The chat template refused the messages: {reason}", param=conversation)
    if isinstance(error, VLLMClientError):
        return refused(str(error), getattr(error, "parameter", None), conversation)
    # vLLM still raises plain ValueErrors for bad requests (entrypoints/serve/exception_handling, "not yet migrated");
    # it counts them as the client's, and so do we.
    if isinstance(error, ValueError | TypeError | OverflowError | NotImplementedError):
        return refused(engine_reason(error), None, conversation)
    if isinstance(error, RecursionError):
        return errors.InvalidRequestError("Something in the request is nested too deeply. Send it flatter.")
    logger.error("engine call failed", exc_info=error)
    return errors.InternalError(f"the engine failed: {type(error).__name__}")


def _template_error(error: BaseException) -> BaseException | None:
    """What jinja2 raised, by itself or as the cause of vLLM's error."""
    for each in (error, error.__cause__):
        if any(base.__name__ == "TemplateError" for base in type(each).__mro__):
            return each
    return None


__all__ = ["translated"]
