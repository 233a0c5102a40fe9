"""Every name a client may put into ``model``, and the revision it means right now.

The registry on disk is the truth; the catalog is this process's picture of it. A watcher refreshes the picture a few
times a second, and a name that the picture lacks is looked up on disk before it is called unknown: a job's model is
callable the moment its artifact is published, whoever published it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from registry import Alias, Artifact, Registry, errors, parse_reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name means: the base model, or one revision."""

    requested: str
    artifact: Artifact | None
    """``None``: the base model."""
    answer_model: str
    """What the answer calls itself: the exact revision, so that a client sees what an alias meant; a write-once
    ``ft:`` name is as exact and stays as it is."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One consistent picture of the registry. Never changed after it is made."""

    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    """By revision."""
    aliases: Mapping[str, Alias] = field(default_factory=dict)


class Catalog:
    """Names to revisions for one base model.

    ``on_change`` callbacks run on the event loop after each change with the old and the new snapshot.
    """

    def __init__(self, registry: Registry, base_model: str, *, poll_seconds: float = 0.25) -> None:
        self.base_model = base_model
        self._registry = registry
        self._poll_seconds = poll_seconds
        self._snapshot = Snapshot()
        self._change_token: Hashable = None
        self._refreshing = asyncio.Lock()
        self._reads_begun = 0
        self._last_whole_read = 0
        self._on_change: list[Callable[[Snapshot, Snapshot], None]] = []

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    @property
    def registry(self) -> Registry:
        return self._registry

    def on_change(self, callback: Callable[[Snapshot, Snapshot], None]) -> None:
        self._on_change.append(callback)

    async def resolve(self, model: str) -> Target:
        """The target of ``model``: base, alias, ``name@revision`` or ``ft:`` name.

        Raises:
            ModelNotFoundError: neither the picture nor the disk knows it, or it is not a name at all.
        """
        if model == self.base_model:
            return Target(model, None, model)
        artifact = self._lookup(model)
        if artifact is None and _is_reference(model):
            try:
                await self.refresh()
            except errors.StorageError as error:
                raise errors.UnavailableError(
                    f"The model {model!r} is not among those known, and the registry cannot be read just now.",
                    code="registry_unreadable",
                    retry_after_seconds=5,
                ) from error
            artifact = self._lookup(model)
        if artifact is None:
            raise errors.ModelNotFoundError(
                f"The model {model[:200]!r} does not exist. GET /v1/models lists what does.", param="model"
            )
        answer = model if model.startswith("ft:") else artifact.revision
        return Target(model, artifact, answer)

    async def refresh(self) -> None:
        """Read the registry again. Returns after a read that began no earlier than this call.

        Callers that arrive while a read runs share the next one, so that a flood of unknown names costs one read at a
        time and keeps no state.
        """
        asked_at = self._reads_begun
        async with self._refreshing:
            if self._last_whole_read > asked_at:
                return  # another caller's read began after we asked, and was not cut short
            self._reads_begun += 1
            this_read = self._reads_begun
            token = await asyncio.to_thread(self._registry.change_token)
            if token != self._change_token:
                snapshot = await asyncio.to_thread(self._read)
                self._change_token = token
                self._publish(snapshot)
            self._last_whole_read = this_read

    async def watch(self) -> None:
        """Refresh for ever; run as a task. A registry that cannot be read keeps the last picture."""
        is_readable = True
        while True:
            try:
                await self.refresh()
                if not is_readable:
                    logger.info("the registry can be read again")
                is_readable = True
            except errors.StorageError as error:
                if is_readable:
                    logger.warning("the registry cannot be read, serving what is known: %s", error)
                is_readable = False
            await asyncio.sleep(self._poll_seconds)

    def _lookup(self, model: str) -> Artifact | None:
        snapshot = self._snapshot
        if (alias := snapshot.aliases.get(model)) is not None:
            return snapshot.artifacts.get(alias.revision)
        if (artifact := snapshot.artifacts.get(model)) is not None:
            return artifact
        name, separator, prefix = model.partition("@")
        if not separator or len(prefix) < 8:
            return None
        matches = [a for a in snapshot.artifacts.values() if a.name == name and a.digest.startswith(prefix)]
        return matches[0] if len(matches) == 1 else None

    def _read(self) -> Snapshot:
        artifacts = {artifact.revision: artifact for artifact in self._registry.artifacts()}
        aliases = {alias.alias: alias for alias in self._registry.aliases()}
        return Snapshot(artifacts, aliases)

    def _publish(self, snapshot: Snapshot) -> None:
        old, self._snapshot = self._snapshot, snapshot
        for callback in self._on_change:
            callback(old, snapshot)


def _is_reference(model: str) -> bool:
    """Whether ``model`` has the form of a name at all; anything else is not worth a look at the disk."""
    try:
        parse_reference(model)
    except errors.InvalidNameError:
        return False
    return True
