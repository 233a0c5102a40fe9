"""Making changes one at a time, and noticing that one was made.

A writer replaces the generation twice while it holds the lock: before its change by ``changing <random>``, after it by
``settled <random>``. So a settled generation that stays the same vouches for everything below, and looking costs the
same with one adapter as with thousands. A writer that dies half-way leaves ``changing``, and one of an older version
leaves no such word; until the next change settles it again, readers then look at every entry. So they do where there is
no generation: a writer that finds the disk full takes it away, because removing needs no space and is what frees some.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.durable import TEMPORARY_PREFIX, Filesystem, replace_file, storage_errors
from registry.errors import UnavailableError
from registry.layout import Layout

LOCK_WAIT_SECONDS = 60.0
_MAX_GENERATION_BYTES = 64
_CHANGING = "changing"
_SETTLED = "settled"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_CLOCK_TICK_SECONDS = 0.02
"""Longer than that of any kernel that gives files their times: 10 ms at 100 Hz."""


class Changes:
    """The registry's one lock and its generation."""

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
                self._announce_change()
                try:
                    yield
                finally:
                    # The change is made or undone by now; a disk that refuses this only makes readers look harder.
                    with suppress(OSError):
                        self._announce(_SETTLED)
            finally:
                lock.release()

    def token(self) -> Hashable:
        """A value that differs whenever a writer changed artifacts or aliases; take it before you read what you
        compare it for.

        The two directories' own times are in it because they cost nothing and show some of what was done by hand.
        On NFS, attribute caching delays all of it.
        """
        try:
            generation = self._layout.generation.read_bytes()[:_MAX_GENERATION_BYTES]
        except (FileNotFoundError, PermissionError):
            generation = b""
        if generation.startswith(_SETTLED.encode()):
            return generation, _time_of(self._layout.artifacts), _time_of(self._layout.aliases)
        # File times alone can miss the second of two changes within one clock tick (4 ms on ext4). But while the
        # generation stays the same there is at most one change, and one change always shows: it adds or removes an
        # entry, or replaces an alias file while the old one still exists, hence with another inode. The generation
        # must be read first: read last, it could be newer than the entries beside it.
        return generation, self.scan()

    def scan(self) -> Hashable:
        """A value that differs whenever any entry changed, whoever did it; looks at every name and alias."""
        return _name_states(self._layout.artifacts), _alias_states(self._layout.aliases)

    def remove_leftovers(self) -> None:
        """Remove files that a dead writer left beside their target. The caller is inside :meth:`one`."""
        for folder in (self._layout.root, self._layout.aliases):
            for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
                self._filesystem.remove_file(path)

    def _announce_change(self) -> None:
        try:
            self._announce(_CHANGING)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            self._filesystem.remove_file(self._layout.generation)
            # Nothing may tell this change from one before that could not be settled but the entries' own times.
            time.sleep(_CLOCK_TICK_SECONDS)

    def _announce(self, state: str) -> None:
        # Not durable on purpose: after a crash nobody holds a token of before.
        generation = f"{state} {uuid.uuid4().hex}".encode()
        replace_file(self._filesystem, self._layout.generation, generation, durable=False)


_State = tuple[str, int, int, int]


def _time_of(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_ino, status.st_mtime_ns


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
            except PermissionError:
                num_entries = -1  # one name that this user may not list must not hide the others' changes
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
