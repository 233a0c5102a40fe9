"""The seam between a face and whoever decides who may come in. ``capo`` decides; both faces ask before they read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from registry.principal import Admission, Principal, admitted


@dataclass(slots=True)
class Ask:
    """One request at the door."""

    protocol: str
    """``http`` or ``grpc``; a metric label."""
    operation: str
    """``GET /v1/files/{file_id}`` or ``/capo.v1.Inference/Chat``: what stands in the table of rules."""
    credential: str | None
    """The text of ``Authorization``."""
    peer: str
    """Where it comes from, for the audit log."""
    request_id: str
    target: str = ""
    """The path as it was asked for, for the audit log."""
    answer_headers: dict[str, str] = field(default_factory=dict)
    """Filled in by who decides: what the answer says about the asker's limits."""
    result: str | None = None
    """Filled in by the face: how the request ended, where the face knows better than the exception."""
    error_code: str | None = None
    """Filled in by the face: the ``error.code`` of its answer."""


class Access(Protocol):
    @property
    def is_open(self) -> bool:
        """Whether everybody who comes is let in, without a key."""

    def let_in(self, ask: Ask) -> AbstractContextManager[Admission]:
        """Hold the asker's place for the length of the request, with its principal current.

        Raises:
            AuthenticationError: it must say who it is, or is not who it says.
            PermissionDeniedError: it may not do this.
            RateLimitedError: not now.
        """


class OneTenant:
    """Lets everybody in as one and the same principal, who is taken to have shown that already."""

    is_open = False

    def __init__(self, principal: Principal) -> None:
        self._principal = principal

    @contextmanager
    def let_in(self, ask: Ask) -> Iterator[Admission]:
        admission = Admission(self._principal)
        with admitted(admission):
            yield admission
