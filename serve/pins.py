"""Adapters that stay in the engine: what was asked for by name, and the revisions that this means right now.

A pin of an alias follows the alias and holds what the alias serves, a running canary too. Pins are this process's own:
those of the settings are there at every start, those made at run time end with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from registry import Artifact, errors, parse_reference
from registry.principal import Principal, note_change
from serve.catalog import Catalog, Snapshot
from serve.pool import AdapterPool
from serve.resident import AdapterState

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


class PinState(StrEnum):
    HELD = "held"
    """Loaded, and stays."""
    LOADING = "loading"
    REFUSED = "refused"
    """Did not pass the gate."""
    MISSING = "missing"
    """The registry has no such name; pinned as soon as it has."""
    NO_ROOM = "no_room"
    """Too many adapters are pinned; some of what this one means is served like any other adapter."""


@dataclass(frozen=True, slots=True)
class Pin:
    """One pin as the admin API shows it."""

    reference: str
    state: PinState
    revisions: list[str]
    """What the reference means now, the main revision first."""
    reason: errors.CapoError | None = None


class Pins:
    """Keeps the pool's pinned adapters loaded. ``may_load`` says whether the engine can take any now."""

    def __init__(
        self, catalog: Catalog, pool: AdapterPool, references: Sequence[str], may_load: Callable[[], bool]
    ) -> None:
        self._catalog = catalog
        self._pool = pool
        self._may_load = may_load
        self._references = dict.fromkeys(references)  # a set in order: earlier pins come first where room is short
        self._held: dict[str, Artifact] = {}
        self._changed = asyncio.Event()
        self._said: dict[str, PinState] = {}

    # -- changing ----------------------------------------------------------------------------------------------

    async def add(self, reference: str, *, load_seconds: float, principal: Principal) -> Pin:
        """Pin what ``reference`` means, and load it; takes at most ``load_seconds``, and goes on behind the answer.

        Raises:
            InvalidNameError: it is no name of an adapter.
            ModelNotFoundError: there is no such adapter.
            PermissionDeniedError: it is another tenant's, who lets the principal call it and no more; or it is shared
                by all, and not the principal's to pin.
            InvalidArtifactError: the gate or the engine refuses it. EngineDeadError: the engine died meanwhile.
            ConflictError: too many adapters are pinned.
        """
        if reference == self._catalog.base_model:
            raise errors.InvalidNameError(f"{reference!r} is the base model, which is always loaded. Pin an adapter.")
        parse_reference(reference)
        artifacts = await self._catalog.served_by(reference, principal=principal)
        if not self._catalog.snapshot.is_seen_by(principal, reference, artifacts[0]):
            raise errors.PermissionDeniedError(
                f"{reference!r} is another tenant's. You may call it; its owner decides whether to pin it.",
                code="not_the_owner",
            )
        self._require_own(reference, artifacts, principal)
        for artifact in artifacts:
            await self._pool.vet(artifact)
        wanted = self._wanted([*self._references, reference])
        if len(wanted) > self._pool.max_pins:
            raise errors.ConflictError(
                f"Pinning {reference!r} would keep {len(wanted)} adapters in the engine for good; at most "
                f"{self._pool.max_pins} may be, one less than there are slots, so that others find one. Unpin another "
                "(DELETE /v1/adapters/{reference}/pin), or start the service with more: -- --max-loras.",
                code="too_many_pins",
            )
        is_new = reference not in self._references
        self._references[reference] = None
        self.follow()
        try:
            await self._pool.warm(artifacts, load_seconds)
        except errors.CapoError:
            if is_new:
                self._references.pop(reference, None)
                self.follow()
            raise
        return self._pin(reference)

    def remove(self, reference: str, *, principal: Principal) -> None:
        """Treat what ``reference`` means like any other adapter again.

        Raises:
            NotFoundError: it is not pinned, as far as the principal sees.
            PermissionDeniedError: it is shared by all, and not the principal's to unpin.
        """
        note_change(reference=reference)
        if all(pin.reference != reference for pin in self.seen_by(principal)):
            raise errors.NotFoundError(
                f"{reference[:200]!r} is not pinned. GET /v1/pins lists what is.", code="not_pinned"
            )
        self._require_own(reference, self._catalog.snapshot.served_by(reference), principal)
        del self._references[reference]
        self._said.pop(reference, None)
        self.follow()

    def _require_own(self, reference: str, served: Sequence[Artifact], principal: Principal) -> None:
        if served and not self._catalog.snapshot.is_owned_by(principal, reference, served[0]):
            raise errors.PermissionDeniedError(
                f"{reference!r} is shared by all tenants, so only the service's own may pin or unpin it. Pin an alias "
                "of yours that serves it.",
                code="shared_model",
            )

    def follow(self) -> None:
        """Pin in the pool what the references mean now. Called after every change of the registry."""
        self._apply()
        self._changed.set()

    def _apply(self) -> None:
        self._held = dict(itertools.islice(self._wanted(self._references).items(), self._pool.max_pins))
        self._pool.pin(self._held.keys())

    # -- loading -----------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load what is pinned and not in the engine. Refusals and busy slots are left to the next try."""
        self._apply()  # a refusal may have ended, or one may have made room for the next pin
        absent = [
            artifact
            for revision, artifact in self._held.items()
            if self._pool.status(revision).state in (AdapterState.AVAILABLE, AdapterState.DRAINING)
        ]
        await asyncio.gather(*(self._load(artifact) for artifact in absent))
        self._say_what_changed()

    async def run(self) -> None:
        """Keep what is pinned in the engine, through restarts of it; run as a task."""
        while True:
            self._changed.clear()
            try:
                if self._may_load():
                    await self.load()
            except Exception:
                # Our bug; but without this task no pin would be loaded any more.
                logger.exception("loading what is pinned failed; going on")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._changed.wait()

    async def _load(self, artifact: Artifact) -> None:
        with contextlib.suppress(errors.CapoError):
            async with self._pool.use(artifact):
                pass

    # -- looking -----------------------------------------------------------------------------------------------

    def all(self) -> list[Pin]:
        return [self._pin(reference) for reference in self._references]

    def seen_by(self, principal: Principal) -> list[Pin]:
        """Those of what the principal sees; what is not there yet is the service's own tenant's."""
        snapshot, seen = self._catalog.snapshot, []
        for pin in self.all():
            served = snapshot.served_by(pin.reference)
            if snapshot.is_seen_by(principal, pin.reference, served[0]) if served else principal.owns_shared:
                seen.append(pin)
        return seen

    def covers(self, revision: str) -> bool:
        return revision in self._held

    def _pin(self, reference: str) -> Pin:
        artifacts = self._catalog.snapshot.served_by(reference)
        revisions = [artifact.revision for artifact in artifacts]
        statuses = [self._pool.status(revision) for revision in revisions]
        if not artifacts:
            return Pin(reference, PinState.MISSING, revisions)
        for status in statuses:
            if status.state is AdapterState.REFUSED:
                return Pin(reference, PinState.REFUSED, revisions, status.reason)
        if any(not status.is_pinned for status in statuses):
            return Pin(reference, PinState.NO_ROOM, revisions)
        if any(status.state is not AdapterState.LOADED for status in statuses):
            return Pin(reference, PinState.LOADING, revisions)
        return Pin(reference, PinState.HELD, revisions)

    def _wanted(self, references: Sequence[str] | dict[str, None]) -> dict[str, Artifact]:
        """By revision, in the order of the pins; canaries come after all main revisions. Refused ones hold no room."""
        snapshot: Snapshot = self._catalog.snapshot
        served = [snapshot.served_by(reference) for reference in references]
        in_order = [*(a for group in served for a in group[:1]), *(a for group in served for a in group[1:])]
        return {a.revision: a for a in in_order if self._pool.status(a.revision).state is not AdapterState.REFUSED}

    def _say_what_changed(self) -> None:
        for pin in self.all():
            if self._said.get(pin.reference) is pin.state:
                continue
            self._said[pin.reference] = pin.state
            reason = f": {pin.reason}" if pin.reason is not None else ""
            level = logging.INFO if pin.state in (PinState.HELD, PinState.LOADING) else logging.WARNING
            logger.log(level, "pin of %s: %s%s", pin.reference, pin.state, reason)
