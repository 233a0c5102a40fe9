"""One error as an HTTP answer, wherever it is noticed: OpenAI's error object, by the table in registry/errors.py."""

from __future__ import annotations

import logging

from fastapi.responses import JSONResponse

from registry import errors

logger = logging.getLogger(__name__)


def answer_error(request_id: str, error: Exception) -> JSONResponse:
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
    return JSONResponse(errors.openai_error_body(error), kind.http_status, headers)
