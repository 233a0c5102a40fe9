"""What a call may raise: one root, one class for each kind of gRPC status.

CapoClientError
├── InvalidRequestError      INVALID_ARGUMENT: this request can never work
├── AuthenticationError      UNAUTHENTICATED
├── PermissionDeniedError    PERMISSION_DENIED
├── NotFoundError            NOT_FOUND: no such model, alias or revision
├── ConflictError            FAILED_PRECONDITION: the thing is in a state that forbids this
├── ResourceExhaustedError   RESOURCE_EXHAUSTED: too large, or too much for now
├── UnavailableError         UNAVAILABLE: not now, nobody answers at the address, or the client is closed
├── DeadlineExceededError    DEADLINE_EXCEEDED: the timeout passed (also TimeoutError)
├── CancelledByServerError   CANCELLED, without the caller's asking
└── ServerError              everything else: the server's bug, or a server of another kind
"""

from __future__ import annotations

import grpc


class CapoClientError(Exception):
    """``code`` is the server's machine-readable reason, empty where no Capo answered; ``param`` the field at fault."""

    def __init__(
        self,
        message: str,
        *,
        status: grpc.StatusCode,
        code: str = "",
        param: str | None = None,
        retry_after_seconds: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        self.request_id = request_id


class InvalidRequestError(CapoClientError, ValueError):
    pass


class AuthenticationError(CapoClientError):
    pass


class PermissionDeniedError(CapoClientError):
    pass


class NotFoundError(CapoClientError, LookupError):
    pass


class ConflictError(CapoClientError):
    pass


class ResourceExhaustedError(CapoClientError):
    pass


class UnavailableError(CapoClientError):
    pass


class DeadlineExceededError(CapoClientError, TimeoutError):
    pass


class CancelledByServerError(CapoClientError):
    pass


class ServerError(CapoClientError):
    pass


_KINDS: dict[grpc.StatusCode, type[CapoClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: ConflictError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledByServerError,
}


def closed() -> UnavailableError:
    return UnavailableError(
        "The client is closed. Make a new one.", status=grpc.StatusCode.UNAVAILABLE, code="client_closed"
    )


def error_of(failure: grpc.RpcError) -> CapoClientError:
    """``failure`` in our words; both of grpc's clients raise it with the call's status and metadata on it."""
    status: grpc.StatusCode = failure.code()
    trailers = {key: str(value) for key, value in failure.trailing_metadata() or ()}
    headers = {key: str(value) for key, value in failure.initial_metadata() or ()}
    retry_after = trailers.get("retry-after", "")
    return _KINDS.get(status, ServerError)(
        failure.details() or status.name,
        status=status,
        code=trailers.get("capo-error-code", ""),
        param=trailers.get("capo-error-param"),
        retry_after_seconds=float(retry_after) if retry_after.isdecimal() else None,
        request_id=headers.get("x-request-id"),
    )
