"""What an adapter is to this process: its state, and one stay of it in the engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum

from registry import Artifact, errors
from serve.engine_api import EngineAdapter


class AdapterState(StrEnum):
    AVAILABLE = "available"
    """In the registry; loads on first use."""
    LOADING = "loading"
    LOADED = "loaded"
    DRAINING = "draining"
    """Leaves the engine when its last user is done, unless it is taken back before."""
    REFUSED = "refused"
    """Did not pass the gate; never reaches traffic."""


@dataclass(slots=True)
class Resident:
    """One adapter on its way into, in, or on its way out of the engine."""

    artifact: Artifact
    adapter: EngineAdapter
    state: AdapterState = AdapterState.LOADING
    users: int = 0
    """Requests that hold it, those still waiting for the load included."""
    ready: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    ticket: asyncio.Future[None] | None = None
    """Done once it has a slot."""
    waiting_since: float = 0.0
    """When it got into the line for a slot."""
    turn_began_at: float = 0.0
    """When it was loaded, or taken back while it drained."""
    last_used_at: float = 0.0
    load_seconds: float | None = None
    probe_agreement: float | None = None
    is_ahead: bool = False
    """Nobody asked for it: it goes on, also without users, as long as there is a slot for it that nobody needs."""
    is_released: bool = False
    """Leaves for good when its present users are done; it is not taken back for later ones."""
    is_withdrawn: bool = False
    """Released because the registry no longer has its revision."""
    earlier_stay: Resident | None = None
    """What serves its users in its place: it still drained when this one's turn came, and was taken back."""

    @property
    def serving(self) -> Resident:
        """The stay that counts and serves the users of this one."""
        return self if self.earlier_stay is None else self.earlier_stay

    def not_ready_in(self, seconds: float, *, max_loras: int) -> errors.UnavailableError:
        """For who has waited for it for ``seconds``; says what for."""
        revision = self.artifact.revision
        if self.ticket is not None and not self.ticket.done():
            return errors.UnavailableError(
                f"No adapter slot became free for {revision} in {seconds:g} s: all {max_loras} are in use. Try again, "
                "or start the service with more (--max-loras).",
                code="adapter_slots_busy",
                retry_after_seconds=1,
            )
        what = "its files were still being checked" if self.ticket is None else "the engine was still loading it"
        return errors.UnavailableError(
            f"{revision} was not ready after {seconds:g} s: {what}. Try again shortly; if it stays so, look at the "
            "registry's disk.",
            code="adapter_load_slow",
            retry_after_seconds=1,
        )

    @property
    def is_idle(self) -> bool:
        return self.users == 0 and self.state is not AdapterState.LOADING


@dataclass(eq=False, slots=True)
class Vetting:
    """One look of the gate at a revision without a load."""

    revision: str
    is_withdrawn: bool = False
    """The registry has lost the revision meanwhile."""


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """What the admin API says about one revision."""

    state: AdapterState
    reason: errors.CapoError | None = None
    resident: Resident | None = None
    is_pinned: bool = False
    notes: tuple[str, ...] = ()
    """What the gate could not check; empty also before it has looked."""
