"""Every name a client may put into ``model``, and the revision it means right now.

The registry on disk is the truth; the catalog is this process's picture of it. A watcher looks for changes a few times
a second, which costs the same with any number of adapters; now and then it looks at every entry, because somebody may
have changed the directory by hand. A name that the picture lacks is looked up on disk before it is called unknown: a
job's model is callable the moment its artifact is published, whoever published it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from registry import Alias, Artifact, DamagedArtifact, Registry, errors, parse_reference
from registry.names import MIN_DIGEST_PREFIX
from registry.principal import Principal
from registry.threads import Threads
from serve.canary import Arm, choose
from serve.shares import Shares

logger = logging.getLogger(__name__)

_CHANGE_THREADS = 4
"""All but one wait for the lock, or copy what is imported before they need it."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name means: the base model, or one revision."""

    requested: str
    artifact: Artifact | None
    """``None``: the base model."""
    answer_model: str
    """What the answer calls itself: the exact revision, so that a client sees what an alias meant; a write-once
    ``ft:`` name is as exact and stays as it is."""
    arm: Arm | None = None
    """For an alias that runs a canary: which of its two revisions this is."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One consistent picture of the registry. Never changed after it is made; looking up costs the same at any size."""

    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    """By revision."""
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    by_prefix: Mapping[str, Sequence[Artifact]] = field(default_factory=dict)
    """By name and the shortest prefix of a digest that may be asked for."""
    damaged: Mapping[str, DamagedArtifact] = field(default_factory=dict)
    """What should be an artifact and is not, by revision. No name means it."""

    @classmethod
    def of(
        cls, artifacts: Iterable[Artifact], aliases: Iterable[Alias], damaged: Iterable[DamagedArtifact] = ()
    ) -> Snapshot:
        by_revision: dict[str, Artifact] = {}
        by_prefix: defaultdict[str, list[Artifact]] = defaultdict(list)
        for artifact in artifacts:
            by_revision[artifact.revision] = artifact
            by_prefix[f"{artifact.name}@{artifact.digest[:MIN_DIGEST_PREFIX]}"].append(artifact)
        return cls(
            by_revision,
            {alias.alias: alias for alias in aliases},
            dict(by_prefix),
            {each.revision: each for each in damaged},
        )

    def artifact(self, revision: str) -> Artifact | None:
        """The artifact of ``name@`` and any unique prefix of its digest."""
        if (artifact := self.artifacts.get(revision)) is not None:
            return artifact
        name, _, prefix = revision.partition("@")
        candidates = self.by_prefix.get(f"{name}@{prefix[:MIN_DIGEST_PREFIX]}", ())
        matches = [artifact for artifact in candidates if artifact.digest.startswith(prefix)]
        return matches[0] if len(matches) == 1 else None

    def is_seen_by(self, principal: Principal, reference: str, artifact: Artifact) -> bool:
        """Whether ``reference``, which means ``artifact``, belongs to the principal's tenant or to none."""
        alias = self.aliases.get(reference)
        return principal.sees(artifact.manifest.tenant) and (alias is None or principal.sees(alias.tenant))

    def is_owned_by(self, principal: Principal, reference: str, artifact: Artifact) -> bool:
        """Whether ``reference``, which means ``artifact``, is the principal's to change."""
        alias = self.aliases.get(reference)
        return principal.owns(artifact.manifest.tenant if alias is None else alias.tenant)

    def aliases_of(self, principal: Principal) -> list[Alias]:
        """The aliases that the principal sees, by name."""
        return [alias for _, alias in sorted(self.aliases.items()) if principal.sees(alias.tenant)]

    def served_by(self, reference: str) -> list[Artifact]:
        """What requests to an alias, ``ft:`` name or revision may reach, the main revision first; empty: unknown."""
        alias = self.aliases.get(reference)
        main = self.artifact(reference) if alias is None else self.artifacts.get(alias.revision)
        if main is None:
            return []
        canary = None if alias is None or alias.canary is None else self.artifacts.get(alias.canary.revision)
        return [main] if canary is None else [main, canary]


@dataclass(frozen=True, slots=True)
class _Look:
    """What told us whether the registry changed."""

    token: Hashable = None
    scan: Hashable = None
    scanned_at: float = float("-inf")

    def is_same(self, other: _Look) -> bool:
        return (self.token, self.scan) == (other.token, other.scan)


class Catalog:
    """Names to revisions for one base model.

    ``on_change`` callbacks run on the event loop after each change with the old and the new snapshot. Every
    ``scan_seconds`` the registry is looked at entry by entry. ``shares``: ``None``: nobody shares anything.
    """

    def __init__(
        self,
        registry: Registry,
        base_model: str,
        *,
        poll_seconds: float = 0.25,
        scan_seconds: float = 10.0,
        shares: Shares | None = None,
    ) -> None:
        self.base_model = base_model
        self.shares = shares
        self._registry = registry
        self._poll_seconds = poll_seconds
        self._scan_seconds = scan_seconds
        self._snapshot = Snapshot()
        self._seen = _Look()
        self._refreshing = asyncio.Lock()
        self.changes = Threads("registry-changes", _CHANGE_THREADS)
        """For what changes the registry, and waits for its lock as long as another process holds it."""
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

    async def resolve(self, model: str, *, user: str | None = None, principal: Principal | None = None) -> Target:
        """The target of ``model`` for one request: base, alias, ``name@revision`` or ``ft:`` name.

        ``user`` decides between an alias and its canary; see :func:`serve.canary.choose`. ``principal`` is who asks:
        another tenant's models are not there, unless that tenant shares them. Without one everything is.

        Raises:
            ModelNotFoundError: neither the picture nor the disk knows it, or it is not a name at all.
        """
        if model == self.base_model:
            return Target(model, None, model)
        found = self._lookup(model, user)
        if (found is None or not await self._may_use(principal, model, found[0])) and _is_reference(model):
            # Also for what is another's: it must take as long as what is nobody's.
            await self._refresh_for(model)
            found = self._lookup(model, user)
        if found is None or not await self._may_use(principal, model, found[0]):
            raise _not_found(model)
        artifact, arm = found
        return Target(model, artifact, model if model.startswith("ft:") else artifact.revision, arm)

    async def served_by(self, reference: str, *, principal: Principal | None = None) -> list[Artifact]:
        """See :meth:`Snapshot.served_by`; looks at the disk for what the picture lacks. ``principal``: who asks.

        Raises:
            ModelNotFoundError: it means nothing here.
        """
        artifacts = self._snapshot.served_by(reference)
        if not (artifacts and await self._may_use(principal, reference, artifacts[0])) and _is_reference(reference):
            await self._refresh_for(reference)
            artifacts = self._snapshot.served_by(reference)
        if not artifacts or not await self._may_use(principal, reference, artifacts[0]):
            raise _not_found(reference)
        return artifacts

    async def _may_use(self, principal: Principal | None, model: str, artifact: Artifact) -> bool:
        if principal is None or self._snapshot.is_seen_by(principal, model, artifact):
            return True
        return self.shares is not None and await self.shares.is_shared_with(model, principal.tenant)

    async def _refresh_for(self, model: str) -> None:
        try:
            await self.refresh()
        except errors.StorageError as error:
            raise errors.UnavailableError(
                f"The model {model!r} is not among those known, and the registry cannot be read just now.",
                code="registry_unreadable",
                retry_after_seconds=5,
            ) from error

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
            look = await asyncio.to_thread(self._look, self._seen)
            # What is damaged may be mended in place, which no look at the entries shows.
            may_be_mended = bool(self._snapshot.damaged) and look.scanned_at != self._seen.scanned_at
            is_same = look.is_same(self._seen) and not may_be_mended
            snapshot = None if is_same else await asyncio.to_thread(self._read)
            self._seen = look
            if snapshot is not None:
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
            except Exception as error:  # also a bug: without this task no change would be followed any more
                if is_readable:
                    bug = None if isinstance(error, errors.CapoError) else error
                    logger.warning("the registry cannot be read, serving what is known: %s", error, exc_info=bug)
                is_readable = False
            await asyncio.sleep(self._poll_seconds)

    def _lookup(self, model: str, user: str | None) -> tuple[Artifact, Arm | None] | None:
        snapshot = self._snapshot
        if (alias := snapshot.aliases.get(model)) is not None:
            revision, arm = choose(alias, user)
            artifact = snapshot.artifacts.get(revision)
        else:
            artifact, arm = snapshot.artifact(model), None
        return None if artifact is None else (artifact, arm)

    def _look(self, seen: _Look) -> _Look:
        token = self._registry.change_token()
        if token == seen.token and time.monotonic() - seen.scanned_at < self._scan_seconds:
            return seen
        # Also after a change that the token shows: the next scan is compared with what is read now.
        return _Look(token, self._registry.change_token(thorough=True), time.monotonic())

    def _read(self) -> Snapshot:
        artifacts, damaged = self._registry.survey()
        return Snapshot.of(artifacts, self._registry.aliases(), damaged)

    def _publish(self, snapshot: Snapshot) -> None:
        old, self._snapshot = self._snapshot, snapshot
        for callback in self._on_change:
            callback(old, snapshot)


def _not_found(model: str) -> errors.ModelNotFoundError:
    return errors.ModelNotFoundError(
        f"The model {model[:200]!r} does not exist. GET /v1/models lists what does.", param="model"
    )


def _is_reference(model: str) -> bool:
    """Whether ``model`` has the form of a name at all; anything else is not worth a look at the disk."""
    try:
        parse_reference(model)
    except errors.InvalidNameError:
        return False
    return True
