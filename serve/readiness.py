"""What a service tells whoever asks while requests should not come to it; one answer, whatever is asked."""

from __future__ import annotations

from registry import errors

_MESSAGES = {
    "starting": "The service is still starting. Try again shortly.",
    "draining": "The service is shutting down. Try another replica.",
    "engine_dead": "The engine died and is being started again. Try again shortly.",
}


def require(not_ready_reason: str | None) -> None:
    """Pass where there is no reason.

    Raises:
        UnavailableError: there is one; it is the error's ``code``.
    """
    if not_ready_reason is not None:
        raise errors.UnavailableError(_MESSAGES[not_ready_reason], code=not_ready_reason, retry_after_seconds=5)
