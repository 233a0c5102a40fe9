"""The one root of Capo's errors, and the one table that turns them into wire answers.

    CapoError
    ├── InvalidRequestError      the caller sent something that can never work (also ValueError)
    │   ├── InvalidNameError     a text that is no name, revision or alias
    │   ├── InvalidDataError     a training file or row; carries its 1-based line
    │   └── InvalidArtifactError an artifact that the registry or the engine must not take
    ├── AuthenticationError      no key, or one we do not know
    ├── PermissionDeniedError    a known key without the right
    ├── NotFoundError            no such thing (also LookupError)
    │   └── ModelNotFoundError   no such model; OpenAI clients know its code
    ├── ConflictError            the thing is in a state that forbids this
    ├── TooLargeError            more bytes, tokens or rows than a limit allows
    ├── RateLimitedError         too much for now; carries retry_after_seconds
    ├── StorageError             the disk said no: full, read-only, failed fsync (also OSError)
    ├── UnavailableError         we cannot serve this now; carries retry_after_seconds
    │   └── EngineDeadError      the engine died under the request
    └── InternalError            our bug; clients see no detail

Raise where the cause is known; translate once at the edge with :func:`wire_kind`. A message says what
happened, the value got, what is allowed, and what to do next. Instances survive pickling, so that they
can cross process borders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class CapoError(Exception):
    """Root of everything Capo raises on purpose.

    ``code`` is the machine-readable reason (OpenAI's ``error.code``), ``param`` the request field at fault.
    """

    default_code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        line: int | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code if code is not None else self.default_code
        self.param = param
        self.line = line
        self.retry_after_seconds = retry_after_seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            type(self),
            self.message,
            self.code,
            self.param,
            self.line,
            self.retry_after_seconds,
        )


def _rebuild(
    kind: type[CapoError],
    message: str,
    code: str,
    param: str | None,
    line: int | None,
    retry_after_seconds: float | None,
) -> CapoError:
    return kind(message, code=code, param=param, line=line, retry_after_seconds=retry_after_seconds)


class InvalidRequestError(CapoError, ValueError):
    default_code = "invalid_request"


class InvalidNameError(InvalidRequestError):
    default_code = "invalid_name"


class InvalidDataError(InvalidRequestError):
    default_code = "invalid_data"


class InvalidArtifactError(InvalidRequestError):
    default_code = "invalid_artifact"


class AuthenticationError(CapoError):
    default_code = "invalid_api_key"


class PermissionDeniedError(CapoError):
    default_code = "permission_denied"


class NotFoundError(CapoError, LookupError):
    default_code = "not_found"


class ModelNotFoundError(NotFoundError):
    default_code = "model_not_found"


class ConflictError(CapoError):
    default_code = "conflict"


class TooLargeError(CapoError):
    default_code = "too_large"


class RateLimitedError(CapoError):
    default_code = "rate_limit_exceeded"


class StorageError(CapoError, OSError):
    default_code = "storage_error"


class UnavailableError(CapoError):
    default_code = "unavailable"


class EngineDeadError(UnavailableError):
    default_code = "engine_dead"


class InternalError(CapoError):
    default_code = "internal_error"


@dataclass(frozen=True, slots=True)
class WireKind:
    """How one family of errors looks on the wire."""

    http_status: int
    openai_type: str
    """``error.type`` of OpenAI's error object."""
    grpc_code: str
    """Name of a member of ``grpc.StatusCode``; a name, because this room does not import grpc."""


# HTTP statuses follow what OpenAI's SDK raises for them (openai/_exceptions.py); gRPC codes follow
# https://grpc.io/docs/guides/status-codes/. The most specific class of an error's MRO wins.
WIRE_KINDS: dict[type[CapoError], WireKind] = {
    InvalidRequestError: WireKind(400, "invalid_request_error", "INVALID_ARGUMENT"),
    AuthenticationError: WireKind(401, "authentication_error", "UNAUTHENTICATED"),
    PermissionDeniedError: WireKind(403, "permission_error", "PERMISSION_DENIED"),
    NotFoundError: WireKind(404, "invalid_request_error", "NOT_FOUND"),
    ConflictError: WireKind(409, "invalid_request_error", "FAILED_PRECONDITION"),
    TooLargeError: WireKind(413, "invalid_request_error", "RESOURCE_EXHAUSTED"),
    RateLimitedError: WireKind(429, "rate_limit_error", "RESOURCE_EXHAUSTED"),
    StorageError: WireKind(507, "server_error", "RESOURCE_EXHAUSTED"),
    UnavailableError: WireKind(503, "server_error", "UNAVAILABLE"),
    CapoError: WireKind(500, "server_error", "INTERNAL"),
}


def wire_kind(error: BaseException) -> WireKind:
    """The wire form of ``error``; anything that is no :class:`CapoError` counts as our bug (500)."""
    for kind in type(error).__mro__:
        if kind in WIRE_KINDS:
            return WIRE_KINDS[kind]
    return WIRE_KINDS[CapoError]


def openai_error_body(error: BaseException) -> dict[str, dict[str, Any]]:
    """The body of OpenAI's error object. Errors that are our bug keep their text to themselves."""
    kind = wire_kind(error)
    if not isinstance(error, CapoError) or kind.http_status == 500:
        message = "Capo hit an internal error. The request id in x-request-id finds it in the server's log."
        return {"error": {"message": message, "type": kind.openai_type, "param": None, "code": "internal_error"}}
    body: dict[str, Any] = {
        "message": error.message,
        "type": kind.openai_type,
        "param": error.param,
        "code": error.code,
    }
    if error.line is not None:
        body["line"] = error.line
    return {"error": body}
