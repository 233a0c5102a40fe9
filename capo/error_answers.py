"""One error as an HTTP answer, wherever it is noticed: OpenAI's error object, by the table in registry/errors.py."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from registry import errors

logger = logging.getLogger(__name__)


def answer_error(state: MutableMapping[str, Any], error: Exception) -> JSONResponse:
    """``state`` is the request's, with its ``request_id``; it keeps the answer's ``error_code``, which is counted."""
    request_id = state.get("request_id", "-")
    body = errors.openai_error_body(error)
    state["error_code"] = body["error"]["code"]
    kind = errors.wire_kind(error)
    if kind.http_status >= 500:
        logger.warning("request %s: %s", request_id, error)
    headers = {}
    if isinstance(error, errors.CapoError) and error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_seconds)))
    if kind.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"  # RFC 9110, section 15.5.2
    if kind.http_status == 409:
        # OpenAI's SDK retries a 409 by itself unless told not to; the state that forbids the request will not go away.
        headers["x-should-retry"] = "false"
    return JSONResponse(body, kind.http_status, headers)
