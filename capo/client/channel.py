"""How both clients connect and call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from capo.client.messages import refused

Metadata: TypeAlias = tuple[tuple[str, str], ...]

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_SECONDS = 600.0
"""As long as OpenAI's SDK waits: an answer of thousands of tokens from a small machine takes minutes."""
DEFAULT_RETRIES = 2
_FOLLOW_RETRIES = 20
"""With pauses of up to five seconds: about as long as a service takes to start again."""

OPTIONS = (
    # An answer with log probabilities grows beyond gRPC's 4 MiB; what was asked for may be large.
    ("grpc.max_receive_message_length", -1),
    # A server whose machine is gone says nothing; without pings a call would wait for its whole timeout.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, slots=True)
class CallSettings:
    """What every call of a client uses unless told otherwise."""

    timeout_seconds: float | None
    retries: int
    metadata: Metadata

    def timeout(self, given: float | None) -> float | None:
        return self.timeout_seconds if given is None else given

    @property
    def follow_retries(self) -> int:
        """Of a stream that can be taken up again; it waits for a service that starts anew."""
        return _FOLLOW_RETRIES if self.retries else 0

    def metadata_with(self, request_id: str | None) -> Metadata:
        """What goes with a call.

        Raises:
            InvalidRequestError: no header can carry it.
        """
        if request_id is None:
            return self.metadata
        return (*self.metadata, ("x-request-id", _header_value("request_id", request_id)))


def call_settings(
    timeout_seconds: float | None, retries: int, metadata: Sequence[tuple[str, str]], api_key: str | None
) -> CallSettings:
    if retries < 0:
        raise ValueError(f"retries is {retries}; 0 turns them off")
    key = (api_key or "").strip()  # a file that it was read from ends with a newline
    shown = (("authorization", f"Bearer {_header_value('api_key', key)}"),) if key else ()
    return CallSettings(timeout_seconds, retries, (*metadata, *shown))


def _header_value(name: str, value: str) -> str:
    if not (isinstance(value, str) and value.isascii() and value.isprintable()):
        # The value stays out of the message: it may be a secret.
        raise refused(f"{name} has characters that no header can carry; ASCII without line breaks is allowed", name)
    return value
