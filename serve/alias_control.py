"""Changing aliases through a running service: what it refuses never takes its traffic, what it takes is warm first.

Flips that other processes make in the registry are followed as they come (:mod:`serve.catalog`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from registry import Alias, Artifact, CanaryRequest, Registry, Seen, errors
from registry.principal import current_principal, note_change
from serve.catalog import Catalog
from serve.read_only import require_writable


@dataclass(frozen=True, slots=True)
class Flip:
    alias: Alias
    is_warm: bool
    """Every revision that the alias serves was in the engine before the flip. False: slots were busy for the whole
    time that a flip waits, and the first requests may wait for one too."""


class Vetting(Protocol):
    """Judges adapters before an alias serves them; :class:`serve.pool.AdapterPool` is one."""

    async def vet(self, artifact: Artifact) -> None: ...

    async def warm(self, artifacts: Iterable[Artifact], seconds: float) -> bool: ...


class AliasControl:
    """``require_ready`` raises while this service cannot judge an adapter; a flip waits ``warm_seconds`` at most."""

    def __init__(
        self, catalog: Catalog, vetting: Vetting, *, require_ready: Callable[[], None], warm_seconds: float
    ) -> None:
        self._catalog = catalog
        self._vetting = vetting
        self._require_ready = require_ready
        self._warm_seconds = warm_seconds

    async def get(self, alias: str) -> Alias:
        """The alias with its history, as it is on disk.

        Raises:
            ModelNotFoundError: it is not set.
        """
        return await asyncio.to_thread((await self._own_registry()).alias, alias)

    async def set(
        self,
        alias: str,
        revision: str,
        *,
        canary: CanaryRequest | None = None,
        expected: str | None = None,
        seen: Seen | None = None,
    ) -> Flip:
        """Vet what the alias is to serve, load it, then point the alias to it; requests after the return see it.

        Time running out while it loads does not stop the flip: the adapter passed the gate, and its requests take
        their turn as any others do.

        Raises:
            InvalidArtifactError: this service refuses one of the revisions; the alias stays as it was.
            UnavailableError: this service is not ready, or its engine died while it loaded them; likewise.
            PermissionDeniedError: the registry is read-only here.
            as :meth:`registry.Registry.set_alias`: likewise.
        """
        note_change(alias=alias, revision=revision, canary=None if canary is None else canary.revision)
        require_writable(self._catalog.registry, "set an alias")
        self._require_ready()
        if alias == self._catalog.base_model:
            raise errors.InvalidNameError(
                f"{alias!r} is the base model of this service. Choose another name.",
                code="reserved_name",
                param="alias",
            )
        registry = await self._own_registry()
        checked = await asyncio.to_thread(registry.check_alias, alias, revision, canary=canary, expected=expected)
        for artifact in checked.artifacts:
            await self._vetting.vet(artifact)
        is_warm = await self._vetting.warm(checked.artifacts, self._warm_seconds)
        # What somebody else made of the alias meanwhile stays: a rollback is not undone by a flip that was slow.
        record = await self._catalog.changes.run(
            registry.set_alias, alias, revision, canary=canary, expected=expected, seen=seen or checked.seen
        )
        await self._catalog.refresh()
        return Flip(record, is_warm)

    async def roll_back(self, alias: str) -> Alias:
        """End the alias's canary, or else go back one revision; at once, whatever state the engine is in.

        Raises:
            PermissionDeniedError: the registry is read-only here.
            as :meth:`registry.Registry.rollback_alias`.
        """
        note_change(alias=alias)
        require_writable(self._catalog.registry, "roll back an alias")
        record = await self._catalog.changes.run((await self._own_registry()).rollback_alias, alias)
        await self._catalog.refresh()
        return record

    async def remove(self, alias: str) -> Alias:
        """Remove the alias; the adapters stay in the registry. Returns what was removed.

        Raises:
            PermissionDeniedError: the registry is read-only here.
            as :meth:`registry.Registry.remove_alias`.
        """
        note_change(alias=alias)
        require_writable(self._catalog.registry, "remove an alias")
        removed = await self._catalog.changes.run((await self._own_registry()).remove_alias, alias)
        await self._catalog.refresh()
        return removed

    async def _own_registry(self) -> Registry:
        """As whoever asks sees it."""
        return await asyncio.to_thread(self._catalog.registry.on_behalf_of, current_principal())
