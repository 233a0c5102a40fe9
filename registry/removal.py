"""Taking things away: one revision on request, or what a sweep finds nobody needs.

Under the lock an artifact is only renamed into ``trash/``; its bytes are deleted after the lock is released.
"""

from __future__ import annotations

from registry.aliases import AliasStore
from registry.artifacts import Artifact, ArtifactStore
from registry.changes import Changes
from registry.durable import Filesystem, storage_errors
from registry.errors import ConflictError
from registry.garbage import GcReport, tree_size_bytes, unneeded
from registry.layout import Layout
from registry.names import RevisionReference, parse_alias
from registry.staging import StagingArea


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
            users = [a.revision for a in self._artifacts.all() if a.manifest.base_model.id == artifact.revision]
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
