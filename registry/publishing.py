"""Publishing: stage, fsync every file, manifest, fsync, rename, fsync the parent, then the aliases.

Everything slow (copying, hashing) happens in a staging directory without any lock. What readers see changes
only in ``_commit``, under the registry's lock, and first of all by one rename of a directory that is durable
already.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from registry.aliases import AliasStore
from registry.artifacts import Artifact, ArtifactStore
from registry.changes import Changes
from registry.durable import Filesystem, storage_errors
from registry.manifest import MANIFEST_NAME, Manifest, ManifestDraft, manifest_digest
from registry.names import MutableReference
from registry.staging import StagingArea, copy_into, seal


class Publisher:
    def __init__(
        self,
        filesystem: Filesystem,
        artifacts: ArtifactStore,
        aliases: AliasStore,
        changes: Changes,
        staging: StagingArea,
    ) -> None:
        self._filesystem = filesystem
        self._artifacts = artifacts
        self._aliases = aliases
        self._changes = changes
        self._staging = staging

    def publish(self, source_dir: Path, draft: ManifestDraft, targets: list[MutableReference], *, now: int) -> Artifact:
        """See :meth:`registry.store.Registry.publish`; names are checked already, ``now`` is in unix seconds."""
        staged = self._staging.holds(source_dir)
        with nullcontext(source_dir) if staged else self._staging.open() as staging:
            with storage_errors(f"write the files of '{draft.name}'"):
                if not staged:
                    copy_into(self._filesystem, source_dir, staging)
                manifest = self._seal(staging, draft, now)
            return self._commit(staging, manifest, targets, now)

    def _seal(self, staging: Path, draft: ManifestDraft, now: int) -> Manifest:
        """Make the staged files durable, and beside them the manifest: the twin's own, if there is a twin.

        A twin is a published artifact of the same content. With its manifest, time included, the digest is
        the same, so a publisher that was killed before it could tell anybody may repeat without making a
        second revision.
        """
        files = seal(self._filesystem, staging)
        manifest = Manifest.from_draft(draft, files=files, created_at=now)
        twin = self._artifacts.twin(manifest)
        if twin is not None:
            manifest = twin.manifest
        path = staging / MANIFEST_NAME
        self._filesystem.write_file(path, manifest.to_bytes())
        self._filesystem.make_read_only(path)
        self._filesystem.fsync(path)
        self._filesystem.fsync_dir(staging)
        return manifest

    def _commit(self, staging: Path, manifest: Manifest, targets: list[MutableReference], now: int) -> Artifact:
        name, digest = manifest.name, manifest_digest(manifest.to_bytes())
        damaged = self._artifacts.is_damaged(name, digest)
        with self._changes.one(f"publish '{name}'"):
            # Asked again: another publisher of the same content may have finished since we sealed.
            artifact = self._artifacts.twin(manifest) or self._artifacts.at(name, digest, manifest)
            self._artifacts.require_single_revision(artifact)
            for target in targets:
                self._aliases.check(target, artifact, expected=None)
            self._artifacts.add(staging, artifact, replace=damaged)
            for target in targets:
                self._aliases.put(target, artifact, expected=None, now=now)
        return artifact
