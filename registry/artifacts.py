"""The immutable half of a registry: artifact directories, found, read, verified, added and taken away.

A directory counts as an artifact only if it is named by the sha256 of its manifest, and the manifest names
the directory above it. One that is named by any digest and is no artifact is damaged; it is listed as such and means
nothing. Everything else under ``artifacts/`` is ignored by readers.
"""

from __future__ import annotations

import copy
import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from registry.durable import Filesystem
from registry.errors import (
    ConflictError,
    InvalidArtifactError,
    InvalidNameError,
    ModelNotFoundError,
    PermissionDeniedError,
)
from registry.files import hash_file, read_limited, regular_files
from registry.layout import Layout
from registry.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, manifest_digest
from registry.names import REVISION_DIGITS, RevisionReference, check_name, is_digest
from registry.principal import Principal

_Signature = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Artifact:
    """One published artifact. Two are equal when name and digest are."""

    name: str
    digest: str
    path: Path = field(compare=False)
    manifest: Manifest = field(compare=False, repr=False)

    @property
    def revision(self) -> str:
        return revision_of(self.name, self.digest)


@dataclass(frozen=True, slots=True)
class DamagedArtifact:
    """A directory that is named as an artifact is, and is none."""

    name: str
    digest: str
    """What the directory is named by; nothing vouches for it. Empty: that of all revisions of the name."""
    error: InvalidArtifactError = field(compare=False)

    @property
    def revision(self) -> str:
        return revision_of(self.name, self.digest)


def revision_of(name: str, digest: str) -> str:
    return f"{name}@{digest[:REVISION_DIGITS]}"


class ArtifactStore:
    """Reads need no lock. Whoever calls ``add``, ``discard`` or ``remove_empty_names`` holds the registry's
    lock.

    ``principal``: on whose behalf; :meth:`find` finds nothing that it does not see.
    """

    def __init__(self, layout: Layout, filesystem: Filesystem, principal: Principal | None = None) -> None:
        self._layout = layout
        self._filesystem = filesystem
        self._principal = principal
        # Manifests never change under a path; the signature notices a directory that was replaced by hand.
        self._cache: dict[Path, tuple[_Signature, Artifact]] = {}

    def load(self, name: str, digest: str) -> Artifact:
        """The artifact with exactly this name and digest.

        Raises:
            FileNotFoundError: there is no such directory, or it has no manifest.
            InvalidArtifactError: its manifest does not vouch for it.
        """
        path = self._layout.artifact(name, digest)
        status = (path / MANIFEST_NAME).lstat()
        signature = (status.st_ino, status.st_mtime_ns, status.st_size)
        cached = self._cache.get(path)
        if cached is not None and cached[0] == signature:
            return cached[1]
        artifact = Artifact(name, digest, path, _read_manifest(path, name, digest))
        self._cache[path] = (signature, artifact)
        return artifact

    def directories(self, name: str, digest_prefix: str = "") -> list[str]:
        """Digests that directories under ``name`` are named by, whole or damaged, sorted."""
        try:
            with os.scandir(self._layout.artifacts / name) as entries:
                return sorted(
                    entry.name
                    for entry in entries
                    if is_digest(entry.name)
                    and entry.name.startswith(digest_prefix)
                    and entry.is_dir(follow_symlinks=False)
                )
        except (FileNotFoundError, NotADirectoryError):
            return []

    def find(self, reference: RevisionReference) -> Artifact:
        """The artifact whose digest starts with the reference's prefix.

        Raises:
            ModelNotFoundError: none does, or more than one.
        """
        found = [
            artifact
            for artifact in self._read(reference.name, reference.digest_prefix)
            if isinstance(artifact, Artifact)
            if self._principal is None or self._principal.sees(artifact.manifest.tenant)
        ]
        if not found:
            raise ModelNotFoundError(
                f"The model '{reference.text}' does not exist. List the revisions of '{reference.name}' to "
                "see which do.",
                param="model",
            )
        if len(found) > 1:
            raise ModelNotFoundError(
                f"The model '{reference.text}' is ambiguous: {len(found)} revisions start with these digits. "
                "Give more digits.",
                param="model",
            )
        return found[0]

    def find_own(self, reference: RevisionReference) -> Artifact:
        """As :meth:`find`, if it may be removed.

        Raises:
            PermissionDeniedError: it is shared by all, and only the service's own tenant may change that.
        """
        artifact = self.find(reference)
        if self._principal is not None and not self._principal.owns(artifact.manifest.tenant):
            raise PermissionDeniedError(
                f"'{artifact.revision}' is shared by all tenants, so only the service's own may remove it.",
                code="shared_model",
                param="model",
            )
        return artifact

    def all(self, name: str | None = None) -> list[Artifact]:
        """All valid artifacts (of one name), by name, then age, then digest.

        Raises:
            OSError: the disk cannot be read. An empty answer always means "nothing published".
        """
        return self.survey(name)[0]

    def survey(self, name: str | None = None) -> tuple[list[Artifact], list[DamagedArtifact]]:
        """As :meth:`all`, and what is damaged, by name and digest."""
        names = self.names() if name is None else [name]
        found: list[Artifact] = []
        damaged: list[DamagedArtifact] = []
        for each in names:
            try:
                entries = list(self._read(each, ""))
            except PermissionError:
                damaged.append(DamagedArtifact(each, "", _unreadable("Its directory")))
                continue
            found += [entry for entry in entries if isinstance(entry, Artifact)]
            damaged += [entry for entry in entries if isinstance(entry, DamagedArtifact)]
        if name is None:
            self._forget_all_but({artifact.path for artifact in found})
        return sorted(found, key=lambda a: (a.name, a.manifest.created_at, a.digest)), damaged

    def names(self) -> list[str]:
        with os.scandir(self._layout.artifacts) as entries:
            return sorted(
                entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and _is_name(entry.name)
            )

    def verify(self, name: str, digest: str) -> list[str]:
        """What is wrong with the artifact on disk, one sentence each; reads every byte."""
        path = self._layout.artifact(name, digest)
        try:
            manifest = _read_manifest(path, name, digest)
        except FileNotFoundError:
            return [f"{MANIFEST_NAME} is missing"]
        except InvalidArtifactError as error:
            return [error.message]
        problems: list[str] = []
        for relative, record in sorted(manifest.files.items()):
            try:
                size_bytes, sha256 = hash_file(path / relative)
            except FileNotFoundError:
                problems.append(f"{relative} is missing")
                continue
            except InvalidArtifactError as error:
                problems.append(error.message)
                continue
            if size_bytes != record.size_bytes:
                problems.append(f"{relative} has {size_bytes} bytes, the manifest says {record.size_bytes}")
            elif sha256 != record.sha256:
                problems.append(f"{relative} has sha256 {sha256}, the manifest says {record.sha256}")
        return problems + _unlisted_files(path, manifest)

    def twin(self, manifest: Manifest) -> Artifact | None:
        """A published artifact that says the same apart from its time, if there is one."""
        return next((a for a in self.all(manifest.name) if a.manifest.is_same_content(manifest)), None)

    def is_damaged(self, name: str, digest: str) -> bool:
        """Whether a directory is there but not what it should be; reads every byte, so ask without the lock."""
        return self._layout.artifact(name, digest).exists() and bool(self.verify(name, digest))

    def at(self, name: str, digest: str, manifest: Manifest) -> Artifact:
        """The artifact that this manifest describes, published already or about to be."""
        return Artifact(name, digest, self._layout.artifact(name, digest), manifest)

    def add(self, staging: Path, artifact: Artifact, *, replace: bool) -> None:
        """Move a sealed staging directory to its place and make that durable.

        What is there already stays (it has the same digest), unless ``replace`` says that it is damaged. If
        the last fsync fails, the artifact is taken away again: a failed publish shows nothing.
        """
        folder = artifact.path.parent
        if not folder.is_dir():
            self._filesystem.mkdir(folder)
            self._filesystem.let_in_readers(folder)
        # Not only when we made it: another publisher may have been killed between its mkdir and its fsync.
        self._filesystem.fsync_dir(self._layout.artifacts)
        if replace and artifact.path.exists():
            self.discard(artifact)
        is_new = True
        try:
            self._filesystem.rename(staging, artifact.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            is_new = False
        try:
            # Also when it was there: whoever put it there may not have come this far.
            self._filesystem.fsync_dir(folder)
        except OSError:
            if is_new:
                with suppress(OSError):
                    self._filesystem.rename(artifact.path, self._layout.trash / uuid.uuid4().hex)
            raise

    def discard(self, artifact: Artifact) -> Path:
        """Take an artifact out of readers' sight, durably; the caller deletes the returned directory later."""
        trash = self._layout.trash / uuid.uuid4().hex
        self._filesystem.rename(artifact.path, trash)
        # Both ends: a rename that is undone while deletions below it are not would bring back half an artifact.
        self._filesystem.fsync_dir(self._layout.trash)
        self._filesystem.fsync_dir(artifact.path.parent)
        self._cache.pop(artifact.path, None)
        return trash

    def remove_empty_names(self) -> None:
        """Remove the directories of names that have nothing below them. Who publishes one of these names waits for the
        lock, and then makes its directory anew."""
        for name in self.names():
            with suppress(OSError):  # most hold something, and one that stays empty harms nobody
                self._filesystem.remove_empty_dir(self._layout.artifacts / name)

    def require_single_revision(self, artifact: Artifact) -> None:
        """Revisions show 16 digits of a digest; refuse a second digest that starts with the same ones."""
        digests = self.directories(artifact.name, artifact.digest[:REVISION_DIGITS])
        others = [digest for digest in digests if digest != artifact.digest]
        if others:
            raise ConflictError(
                f"Digest {artifact.digest} and the published {others[0]} share the revision "
                f"{artifact.revision}. Publish under another name."
            )

    def _read(self, name: str, digest_prefix: str) -> Iterator[Artifact | DamagedArtifact]:
        for digest in self.directories(name, digest_prefix):
            # One bad directory must not hide the others; any other OSError is about the disk and does.
            try:
                yield self.load(name, digest)
            except InvalidArtifactError as error:
                # A copy: a raised instance holds on to the frames that it came through.
                yield DamagedArtifact(name, digest, copy.copy(error))
            except PermissionError:
                yield DamagedArtifact(name, digest, _unreadable(MANIFEST_NAME))
            except (FileNotFoundError, NotADirectoryError):
                # If the directory itself is gone, somebody removed it meanwhile.
                if self._layout.artifact(name, digest).is_dir():
                    missing = f"{MANIFEST_NAME} is missing. Restore the directory from a copy, or remove it."
                    yield DamagedArtifact(name, digest, InvalidArtifactError(missing, code="no_manifest"))

    def _forget_all_but(self, paths: set[Path]) -> None:
        for path in set(self._cache) - paths:
            self._cache.pop(path, None)


def _unreadable(what: str) -> InvalidArtifactError:
    return InvalidArtifactError(
        f"{what} may not be read by this user. Give it back its owner and mode.", code="unreadable"
    )


def _read_manifest(path: Path, name: str, digest: str) -> Manifest:
    data = read_limited(path / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    actual = manifest_digest(data)
    if actual != digest:
        raise InvalidArtifactError(
            f"{MANIFEST_NAME} has sha256 {actual}, the directory is named {digest}. Restore it from a copy.",
            code="digest_mismatch",
        )
    manifest = Manifest.from_bytes(data)
    if manifest.name != name:
        raise InvalidArtifactError(
            f"{MANIFEST_NAME} is for {manifest.name!r}, the directory is below {name!r}. Move it back.",
            code="name_mismatch",
        )
    return manifest


def _unlisted_files(path: Path, manifest: Manifest) -> list[str]:
    try:
        present = set(regular_files(path))
    except InvalidArtifactError as error:
        return [error.message]
    return [f"{extra} is not in the manifest" for extra in sorted(present - set(manifest.files) - {MANIFEST_NAME})]


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except InvalidNameError:
        return False
    return True
