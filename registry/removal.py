"""Taking things away: one revision on request, or what a sweep finds nobody needs.

Under the lock an artifact is only renamed into ``trash/``; its bytes are deleted after the lock is released.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from registry.aliases import Alias, AliasStore
from registry.artifacts import Artifact, ArtifactStore
from registry.changes import Changes
from registry.durable import Filesystem, storage_errors
from registry.errors import ConflictError, InvalidArtifactError, ModelNotFoundError, PermissionDeniedError
from registry.flips import revision_reference
from registry.garbage import GcReport, tree_size_bytes, unneeded
from registry.layout import Layout
from registry.names import MutableReference, RevisionReference, parse_alias
from registry.staging import StagingArea

logger = logging.getLogger(__name__)


class Removal:
    def __init__(
        self,
        layout: Layout,
        filesystem: Filesystem,
        artifacts: ArtifactStore,
        aliases: AliasStore,
        changes: Changes,
        staging: StagingArea,
    ) -> None:
        self._layout = layout
        self._filesystem = filesystem
        self._artifacts = artifacts
        self._aliases = aliases
        self._changes = changes
        self._staging = staging

    def remove(self, reference: RevisionReference, *, force: bool, now: int) -> None:
        """See :meth:`registry.store.Registry.remove`; ``now`` is in unix seconds."""
        action = f"remove '{reference.text}'"
        with self._changes.one(action):
            artifact = self._artifacts.find_own(reference)
            aliases = [a for a in self._aliases.all(skip_damaged=False) if a.serves(artifact.digest)]
            users = self._built_on(artifact)
            if (aliases or users) and not force:
                holders = ", ".join([*(a.alias for a in aliases), *users][:5])
                raise ConflictError(
                    f"'{artifact.revision}' is in use by {holders}. Point them elsewhere or remove them "
                    "first, or force.",
                    code="artifact_in_use",
                )
            for alias in aliases:
                if alias.digest == artifact.digest:
                    self._aliases.remove(parse_alias(alias.alias))
                else:
                    self._aliases.end_canary(parse_alias(alias.alias), alias, now)
            trash = self._artifacts.discard(artifact)
        with storage_errors(action):
            self._filesystem.remove_tree(trash)

    def remove_named(self, alias: MutableReference, *, keep: str | None) -> None:
        """See :meth:`registry.store.Registry.remove_named`."""
        action = f"remove '{alias.text}'"
        with self._changes.one(action):
            record = self._aliases.require_own(alias)
            try:
                others = [each for each in self._aliases.all(skip_damaged=False) if each.alias != record.alias]
            except (InvalidArtifactError, PermissionError) as error:
                logger.warning("could not %s: %s", action, error)  # who asks need not learn of others' names
                raise ConflictError(
                    f"'{alias.text}' cannot be removed now: another name of this registry cannot be read, and may mean "
                    "the same model. Whoever runs the service finds it in the log.",
                    code="registry_damaged",
                ) from error
            canary = [] if record.canary is None else [record.canary.revision]
            doomed = [
                artifact
                for revision in (record.revision, *canary)
                if revision != keep and (artifact := self._unneeded(revision, others)) is not None
            ]
            self._aliases.remove(alias)
            trash = [self._artifacts.discard(artifact) for artifact in doomed]
        with storage_errors(action):
            for path in trash:
                self._filesystem.remove_tree(path)

    def _unneeded(self, revision: str, aliases: list[Alias]) -> Artifact | None:
        """The artifact, if it is there, may be removed, and nothing needs it."""
        with suppress(ModelNotFoundError, PermissionDeniedError):
            artifact = self._artifacts.find_own(revision_reference(revision))
            if not any(alias.serves(artifact.digest) for alias in aliases) and not self._built_on(artifact):
                return artifact
        return None

    def _built_on(self, artifact: Artifact) -> list[str]:
        """Revisions that have it as their base."""
        return [each.revision for each in self._artifacts.all() if each.manifest.base_model.id == artifact.revision]

    def gc(self, *, keep_unaliased: int | None, min_age_seconds: float, now: float) -> GcReport:
        """See :meth:`registry.store.Registry.gc`."""
        doomed: list[Artifact] = []
        with self._changes.one("collect garbage"):
            self._changes.remove_leftovers()
            if keep_unaliased is not None:
                doomed = unneeded(
                    self._artifacts.all(),
                    self._aliases.all(skip_damaged=False),
                    keep_unaliased=keep_unaliased,
                    min_age_seconds=min_age_seconds,
                    now=now,
                )
            for artifact in doomed:
                self._artifacts.discard(artifact)
            self._artifacts.remove_empty_names()
        with storage_errors("collect garbage"):
            trash = sorted(self._layout.trash.iterdir())
            freed_bytes = sum(tree_size_bytes(path) for path in trash)
            for path in trash:
                self._filesystem.remove_tree(path)
            return GcReport(
                removed_revisions=tuple(artifact.revision for artifact in doomed),
                removed_staging=self._staging.reap(),
                removed_trash=max(0, len(trash) - len(doomed)),
                freed_bytes=freed_bytes,
            )
