"""Directories being filled: each with a lock that lives as long as its writer, so that nobody has to guess by
age.

A writer takes the flock of ``<uuid>.lock`` before it makes ``<uuid>/``. Whoever can take that flock later
knows that the writer is gone (the kernel drops it even on kill -9) and may remove both.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.durable import Filesystem, storage_errors
from registry.errors import InvalidArtifactError
from registry.files import check_relative_path, folders_of, hash_file, regular_files
from registry.manifest import MANIFEST_NAME, FileRecord


class StagingArea:
    def __init__(self, directory: Path, filesystem: Filesystem) -> None:
        self._directory = directory
        self._filesystem = filesystem

    @contextmanager
    def open(self) -> Iterator[Path]:
        """A fresh directory to fill; whatever is still there at the end is removed.

        Raises:
            StorageError: the directory could not be made. Errors of the body pass unchanged.
        """
        path = self._directory / uuid.uuid4().hex
        with storage_errors("make a staging directory"):
            lock = self._filesystem.lock(path.with_suffix(".lock"), wait_seconds=60)
        assert lock is not None, f"a fresh uuid was locked by somebody else: {path}"
        try:
            with storage_errors("make a staging directory"):
                self._filesystem.mkdir(path)
            yield path
        finally:
            # A disk that refuses even this must not hide the first error; gc finishes the work later.
            with suppress(OSError):
                self._filesystem.remove_tree(path)
                self._filesystem.remove_file(lock.path)
            lock.release()

    def holds(self, path: Path) -> bool:
        """Whether ``path`` is one of the area's own directories."""
        return path.absolute().parent == self._directory.absolute() and path.is_dir()

    def reap(self) -> int:
        """Remove what dead writers left; returns how many directories went."""
        removed = 0
        stems = {entry.stem for entry in self._directory.iterdir()}
        for stem in sorted(stems):
            path = self._directory / stem
            lock = self._filesystem.lock(path.with_suffix(".lock"), wait_seconds=0)
            if lock is None:
                continue
            try:
                removed += path.exists()
                self._filesystem.remove_tree(path)
                self._filesystem.remove_file(lock.path)
            finally:
                lock.release()
        return removed


def copy_into(filesystem: Filesystem, source: Path, staging: Path) -> None:
    """Copy all files of ``source``, which must be plain ones (see :func:`registry.files.regular_files`)."""
    relative_paths = regular_files(source)
    for folder in reversed(folders_of(relative_paths)):
        filesystem.mkdir(staging / folder)
    for relative in relative_paths:
        filesystem.copy_file(source / relative, staging / relative)


def seal(filesystem: Filesystem, staging: Path) -> dict[str, FileRecord]:
    """Make every staged file read-only and durable, and return its size and sha256.

    Raises:
        InvalidArtifactError: the directory is empty or holds something other than plain files.
        OSError: the disk refused; the staged files must be thrown away.
    """
    relative_paths = regular_files(staging)
    if not relative_paths:
        raise InvalidArtifactError("The directory to publish holds no files. Write the weights first.", code="no_files")
    if MANIFEST_NAME in relative_paths:
        raise InvalidArtifactError(
            f"The directory to publish holds a {MANIFEST_NAME}; the registry writes it itself. Remove that file.",
            code="manifest_not_allowed",
        )
    records: dict[str, FileRecord] = {}
    for relative in relative_paths:
        path = staging / check_relative_path(relative)
        size_bytes, sha256 = hash_file(path)
        filesystem.make_read_only(path)
        filesystem.fsync(path)
        records[relative] = FileRecord(size_bytes=size_bytes, sha256=sha256)
    filesystem.let_in_readers(staging)
    for folder in folders_of(relative_paths):
        filesystem.let_in_readers(staging / folder)
        filesystem.fsync_dir(staging / folder)
    return records
