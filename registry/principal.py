"""Who asks: the tenant and the rights behind one request, and what the request made of them.

Both faces find the principal before they read a body, from the key that the request carries, and set it for the length
of the request. Whatever answers the request asks :func:`current_principal`, which never guesses: without one it raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum

from registry.errors import InternalError

_MAX_NOTE_CHARACTERS = 500
"""Notes are made before what a client sent is checked."""


class Scope(StrEnum):
    """What a key may be good for."""

    INFER = "infer"
    """Completions, tokens, and the list of models."""
    TUNE = "tune"
    """Files, uploads, fine-tuning jobs and what belongs to them."""
    ADMIN = "admin"
    """Adapters, aliases, canaries, pins and permissions."""
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
    owns_shared: bool = False
    """Whether it may change what belongs to no tenant. Only the service's own tenant may."""

    @classmethod
    def local(cls, tenant: str) -> Principal:
        """Whoever asks a service that has no keys: everything is allowed."""
        return cls(tenant, None, frozenset(Scope), owns_shared=True)

    @classmethod
    def for_work(cls, tenant: str, *, house: str) -> Principal:
        """On whose behalf a job is worked. ``house`` is the service's own tenant."""
        return cls(tenant, None, frozenset(), owns_shared=tenant == house)

    def may_call(self, model: str) -> bool:
        """Whether inference may name ``model``; that it is there, is another question."""
        return self.models is None or model in self.models

    def sees(self, tenant: str | None) -> bool:
        """Whether what belongs to ``tenant`` is there for this one; ``None``: it is shared by all."""
        return tenant is None or tenant == self.tenant

    def owns(self, tenant: str | None) -> bool:
        """Whether it may change or remove what belongs to ``tenant``."""
        return self.owns_shared if tenant is None else tenant == self.tenant


@dataclass(slots=True)
class Admission:
    """One request that was let in, and what is to be remembered of it."""

    principal: Principal
    tokens: int = 0
    """Prompt and completion tokens that it cost so far."""
    notes: dict[str, str] = field(default_factory=dict)
    """What it is to change, for the audit log: names, revisions and paths, never contents."""


_current: ContextVar[Admission] = ContextVar("capo_admission")


def current_principal() -> Principal:
    """Who asks. Threads started with :func:`asyncio.to_thread` know it too.

    Raises:
        InternalError: called outside of a request, or on a path that let a request in without asking who it is.
    """
    try:
        return _current.get().principal
    except LookupError as error:
        raise InternalError("nobody was found out to be the principal of this request") from error


def count_tokens(tokens: int) -> None:
    """Charge the request with tokens that it really cost. Work that nobody asked for charges nobody."""
    if (admission := _current.get(None)) is not None:
        admission.tokens += tokens


def note_change(**notes: str | None) -> None:
    """Say for the audit log what the request is to change: names, revisions and paths, never contents. Before anything
    is refused, for the log tells of attempts too."""
    if (admission := _current.get(None)) is not None:
        admission.notes |= {name: value[:_MAX_NOTE_CHARACTERS] for name, value in notes.items() if value is not None}


@contextmanager
def admitted(admission: Admission) -> Iterator[None]:
    """Make ``admission`` the current one for the length of the block."""
    token = _current.set(admission)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def acting_as(principal: Principal) -> Iterator[None]:
    """Make ``principal`` the current one for the length of the block."""
    with admitted(Admission(principal)):
        yield
