"""Everything the registry writes to disk, as about ten operations of one small class.

Only :class:`Filesystem` changes the disk, so that a test can record the operations, replay every crash they
allow (prefixes of the log; writes dropped or torn until the file's fsync; directory entries undone until the
directory's fsync) and read each outcome. What the rest of the registry may rely on after a power cut is
exactly that:

- bytes of a file: after :meth:`Filesystem.fsync` of the file;
- a name (create, rename, remove): after :meth:`Filesystem.fsync_dir` of the directory that holds it;
- a rename happens wholly or not at all.

A failed fsync is final. Linux may drop the dirty pages and report success next time
(https://lwn.net/Articles/752063/), so the caller throws the file away and reports failure; it never tries the
same fsync again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from registry.errors import CapoError, StorageError
from registry.files import open_regular

TEMPORARY_PREFIX = ".tmp-"
"""Files being written beside their target; no name or alias starts with a dot."""

_COPY_CHUNK_BYTES = 4 << 20
_LOCK_POLL_SECONDS = 0.005

_NOT_PERMITTED = (
    "The user of this process lacks the right to: give it the registry's directory, or mend the owner and mode of what "
    "lies in it, then try again."
)
_ADVICE = {
    errno.ENOSPC: "The disk is full: free space (for instance with the registry's gc), then try again.",
    errno.EDQUOT: "The quota is used up: free space or raise the quota, then try again.",
    errno.EIO: "The device failed: check it and the file system before you try again.",
    errno.EROFS: "The file system is read-only: open the registry read-only, or mount it writable.",
    errno.EACCES: _NOT_PERMITTED,
    errno.EPERM: _NOT_PERMITTED,
}


class HeldLock:
    """An exclusive flock; released by :meth:`release` or when the process dies, however it dies.

    flock on NFS needs version 4 or a lock daemon (flock(2)).
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def release(self) -> None:
        os.close(self._descriptor)


class Filesystem:
    """The real disk. All calls block; all raise :class:`OSError` as the operating system gave it."""

    def mkdir(self, path: Path) -> None:
        """Make one directory; fine if it is there."""
        path.mkdir(exist_ok=True)

    def let_in_readers(self, path: Path) -> None:
        """Let everybody list a directory, whatever the umask: the services that read it may run as another user. Who
        may come this far at all, the directories above decide."""
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o055 != 0o055:
            path.chmod(mode | 0o055)

    def write_file(self, path: Path, data: bytes) -> None:
        """Make a new file, readable for everybody; never follows a link or overwrites."""
        with _create(path) as target:
            target.write(data)

    def copy_file(self, source: Path, target: Path) -> None:
        """Copy the bytes of a regular file into a new file; never follows a link at either end."""
        with open_regular(source) as reader, _create(target) as writer:
            shutil.copyfileobj(reader, writer, _COPY_CHUNK_BYTES)

    def make_read_only(self, path: Path) -> None:
        """Readable for everybody, writable for nobody; guards against slips, not against the owner."""
        path.chmod(0o444)

    def fsync(self, path: Path) -> None:
        _fsync(path, os.O_RDONLY)

    def fsync_dir(self, path: Path) -> None:
        _fsync(path, os.O_RDONLY | os.O_DIRECTORY)

    def rename(self, source: Path, target: Path) -> None:
        """Atomic. A file replaces a file; a directory never replaces one that holds something (ENOTEMPTY)."""
        source.rename(target)

    def remove_file(self, path: Path) -> None:
        """Fine if it is gone."""
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and all below it; links are removed, not followed; fine if it is gone."""
        with suppress(FileNotFoundError):
            shutil.rmtree(path)

    def remove_empty_dir(self, path: Path) -> None:
        """Fails with ENOTEMPTY where it holds anything."""
        path.rmdir()

    def lock(self, path: Path, *, wait_seconds: float) -> HeldLock | None:
        """Take the lock file's flock, making the file if needed; None when somebody held it all the time."""
        deadline = time.monotonic() + wait_seconds
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
            else:
                if _is_still_at(descriptor, path):
                    return HeldLock(path, descriptor)
                # Another process removed the file between our open and our flock: this lock excludes nobody.
                os.close(descriptor)
                continue
            if time.monotonic() >= deadline:
                return None
            time.sleep(_LOCK_POLL_SECONDS)


def replace_file(filesystem: Filesystem, path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put ``data`` at ``path`` so that a reader, now or after a crash, sees the old bytes or the new ones.

    The caller keeps other writers of ``path`` away. If the last fsync fails, the old bytes are put back for
    readers of this boot; what a power cut would leave is then unknown, and the caller gets the error. With
    ``durable`` false nothing is synced: after a crash the file may be old, new or empty.
    """
    previous = path.read_bytes() if path.exists() else None
    _swap_in(filesystem, path, data, durable=durable)
    if not durable:
        return
    try:
        filesystem.fsync_dir(path.parent)
    except OSError:
        with suppress(OSError):
            if previous is None:
                filesystem.remove_file(path)
            else:
                _swap_in(filesystem, path, previous, durable=False)
        raise


def _swap_in(filesystem: Filesystem, path: Path, data: bytes, *, durable: bool) -> None:
    """Write a new file beside ``path`` and rename it there; removed again if that fails."""
    temporary = path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        filesystem.write_file(temporary, data)
        if durable:
            filesystem.fsync(temporary)
        filesystem.rename(temporary, path)
    except OSError:
        with suppress(OSError):
            filesystem.remove_file(temporary)
        raise


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn the operating system's errors into :class:`StorageError` with advice.

    The message names no path, because clients see it; the cause keeps it for the log.
    """
    try:
        yield
    except CapoError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno is not None else type(error).__name__
        advice = _ADVICE.get(error.errno or 0, "Check the disk that holds the registry, then try again.")
        raise StorageError(f"Could not {action}: {reason}. {advice}") from error


def _create(path: Path) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o644)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if mode & 0o044 != 0o044:  # the umask of who calls must not hide from services what it changes
        os.fchmod(descriptor, mode | 0o044)
    return os.fdopen(descriptor, "wb")


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_still_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
