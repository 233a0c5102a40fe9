"""Who asks: the tenant and the rights behind one request.

Both faces find the principal before they read a body, from the key that the request carries, and set it for the length
of the request. Whatever answers the request asks :func:`current_principal`, which never guesses: without one it raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from registry.errors import InternalError


class Scope(StrEnum):
    """What a key may be good for."""

    INFER = "infer"
    """Completions, tokens, and the list of models."""
    TUNE = "tune"
    """Files, uploads, fine-tuning jobs and what belongs to them."""
    ADMIN = "admin"
    """Adapters, aliases, canaries and pins."""
    METRICS = "metrics"
    """The metrics page."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    tenant: str
    """Owns files, jobs and models, and sees no other tenant's."""
    key_id: str | None
    """``None``: nobody had to show a key."""
    scopes: frozenset[Scope]
    models: frozenset[str] | None = None
    """The names that inference may call; ``None``: every one that the tenant sees."""

    @classmethod
    def local(cls, tenant: str) -> Principal:
        """Whoever asks a service that has no keys: everything is allowed."""
        return cls(tenant, None, frozenset(Scope))

    def sees(self, tenant: str | None) -> bool:
        """Whether what belongs to ``tenant`` is there for this one; ``None``: it is shared by all."""
        return tenant is None or tenant == self.tenant


_current: ContextVar[Principal] = ContextVar("capo_principal")


def current_principal() -> Principal:
    """Who asks. Threads started with :func:`asyncio.to_thread` know it too.

    Raises:
        InternalError: called outside of a request, or on a path that let a request in without asking who it is.
    """
    try:
        return _current.get()
    except LookupError as error:
        raise InternalError("nobody was found out to be the principal of this request") from error


@contextmanager
def acting_as(principal: Principal) -> Iterator[None]:
    """Set :func:`current_principal` for the length of the block."""
    token = _current.set(principal)
    try:
        yield
    finally:
        _current.reset(token)
