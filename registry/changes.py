"""Making changes one at a time, and noticing that one was made."""

from __future__ import annotations

import os
import uuid
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.durable import TEMPORARY_PREFIX, Filesystem, replace_file, storage_errors
from registry.errors import UnavailableError
from registry.layout import Layout

LOCK_WAIT_SECONDS = 60.0
_MAX_GENERATION_BYTES = 64


class Changes:
    """The registry's one lock and its generation: random text that is replaced before every change."""

    def __init__(self, layout: Layout, filesystem: Filesystem) -> None:
        self._layout = layout
        self._filesystem = filesystem

    @contextmanager
    def one(self, action: str) -> Iterator[None]:
        """Hold the lock, and announce a change before the body makes it; ``action`` says what, for errors.

        Raises:
            UnavailableError: others held the lock for a minute.
            StorageError: the disk refused; also for an :class:`OSError` of the body.
        """
        with storage_errors(action):
            lock = self._filesystem.lock(self._layout.lock, wait_seconds=LOCK_WAIT_SECONDS)
            if lock is None:
                raise UnavailableError(
                    f"Could not {action}: another process has been changing the registry for "
                    f"{LOCK_WAIT_SECONDS:.0f} s. Find out what stopped it, then try again.",
                    retry_after_seconds=LOCK_WAIT_SECONDS,
                )
            try:
                self._announce()
                yield
            finally:
                lock.release()

    def token(self) -> Hashable:
        """A value that differs whenever artifacts or aliases changed; take it before you read what you
        compare it for.

        File times alone can miss the second of two changes within one clock tick (4 ms on ext4); that is what
        the generation is for. While it stays the same there is at most one change, and one change always
        shows: it adds or removes an entry, or replaces an alias file while the old one still exists, hence
        with another inode. The generation must be read first: read last, it could be newer than the entries
        beside it. On NFS, attribute caching delays both.
        """
        try:
            generation = self._layout.generation.read_bytes()[:_MAX_GENERATION_BYTES]
        except FileNotFoundError:
            generation = b""
        return generation, _name_states(self._layout.artifacts), _alias_states(self._layout.aliases)

    def remove_leftovers(self) -> None:
        """Remove files that a dead writer left beside their target. The caller is inside :meth:`one`."""
        for folder in (self._layout.root, self._layout.aliases):
            for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
                self._filesystem.remove_file(path)

    def _announce(self) -> None:
        # Not durable on purpose: after a crash nobody holds a token of before.
        replace_file(self._filesystem, self._layout.generation, uuid.uuid4().hex.encode(), durable=False)


_State = tuple[str, int, int, int]


def _name_states(artifacts: Path) -> tuple[_State, ...]:
    """Inode, time and number of entries of each name's directory. The number, because a time may not move."""
    states: list[_State] = []
    with os.scandir(artifacts) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
                num_entries = len(os.listdir(entry.path))  # noqa: PTH208 - pathlib would build a Path per entry
            except (FileNotFoundError, NotADirectoryError):
                continue
            states.append((entry.name, status.st_ino, status.st_mtime_ns, num_entries))
    return tuple(sorted(states))


def _alias_states(aliases: Path) -> tuple[_State, ...]:
    states: list[_State] = []
    with os.scandir(aliases) as entries:
        for entry in entries:
            if entry.name.startswith(TEMPORARY_PREFIX):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            states.append((entry.name, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(sorted(states))
