"""Which states of the disk may a power cut leave? Record the operations of a run, then play every crash they allow.

The model is stricter than any file system in use. Directories and files are inodes. Until a file's fsync its bytes
may be all there, missing, torn or zero. Until a directory's fsync each change of its entries may be undone, in any
combination; a rename counts as one change, made durable by the fsync of the directory that it moves into.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from registry import Filesystem
from registry.durable import HeldLock

State = frozenset[tuple[str, bytes | None]]
"""Path and bytes of every file; None for a directory."""


@dataclass(frozen=True)
class Op:
    kind: str
    path: str = ""
    target: str = ""
    data: bytes = b""


class RecordingFilesystem(Filesystem):
    """Works on the real disk and writes down what it does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[Op] = []

    def acknowledge(self, label: str) -> None:
        """The caller was told that something succeeded; from here on it must survive."""
        self.log.append(Op("acknowledge", label))

    def mkdir(self, path: Path) -> None:
        if not path.exists():
            self.log.append(Op("mkdir", self._name(path)))
        super().mkdir(path)

    def write_file(self, path: Path, data: bytes) -> None:
        super().write_file(path, data)
        self.log.append(Op("create", self._name(path), data=data))

    def copy_file(self, source: Path, target: Path) -> None:
        super().copy_file(source, target)
        self.log.append(Op("create", self._name(target), data=target.read_bytes()))

    def fsync(self, path: Path) -> None:
        super().fsync(path)
        self.log.append(Op("fsync", self._name(path)))

    def fsync_dir(self, path: Path) -> None:
        super().fsync_dir(path)
        if path.is_relative_to(self.root):
            self.log.append(Op("fsync_dir", self._name(path)))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.log.append(Op("rename", self._name(source), self._name(target)))

    def remove_file(self, path: Path) -> None:
        if path.exists():
            self.log.append(Op("unlink", self._name(path)))
        super().remove_file(path)

    def remove_tree(self, path: Path) -> None:
        for inner in sorted(path.rglob("*"), reverse=True):
            self.log.append(Op("unlink", self._name(inner)))
        if path.exists():
            self.log.append(Op("unlink", self._name(path)))
        super().remove_tree(path)

    def remove_empty_dir(self, path: Path) -> None:
        super().remove_empty_dir(path)
        self.log.append(Op("unlink", self._name(path)))

    def lock(self, path: Path, *, wait_seconds: float) -> HeldLock | None:
        if not path.exists():
            self.log.append(Op("create", self._name(path)))
        return super().lock(path, wait_seconds=wait_seconds)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))


@dataclass
class _Effect:
    """Something that a crash may or may not keep."""

    inode: int
    entries: tuple[tuple[int, str, int | None], ...] = ()
    """(directory, name, inode or None for removed); empty for an effect on a file's bytes."""
    durable_with: int = 0
    """The directory whose fsync makes the entries durable."""


@dataclass
class _Disk:
    directories: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    files: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> _Disk:
        return _Disk({inode: dict(entries) for inode, entries in self.directories.items()}, dict(self.files))

    def apply(self, effect: _Effect) -> None:
        for directory, name, inode in effect.entries:
            if inode is not None:
                self.directories[directory][name] = inode
            elif name in self.directories[directory]:
                del self.directories[directory][name]

    def state(self) -> State:
        found: list[tuple[str, bytes | None]] = []
        pending = [("", 0)]
        while pending:
            prefix, directory = pending.pop()
            for name, inode in self.directories[directory].items():
                found.append((prefix + name, self.files.get(inode)))
                if inode in self.directories:
                    pending.append((f"{prefix}{name}/", inode))
        return frozenset(found)


class CrashModel:
    """Feeds on a log, operation by operation, and knows after each what a crash may leave."""

    def __init__(self, before: dict[str, bytes | None]) -> None:
        self._next = itertools.count(1)
        self._now = _Disk()  # what a running program sees
        self._durable = _Disk()
        self._pending: list[_Effect] = []
        for path, data in before.items():
            self._link(path, self._new_inode(data))
        for effect in self._pending:
            self._durable.apply(effect)
        self._pending = []
        self.acknowledged: list[str] = []

    def step(self, op: Op) -> None:
        getattr(self, f"_do_{op.kind}")(op)

    def states(self, rng: random.Random, *, limit: int) -> Iterator[State]:
        """All outcomes of a crash now, or about ``limit`` of them where there are more."""
        options = [4 if not effect.entries else 2 for effect in self._pending]
        total = 1
        for count in options:
            total *= count
        if total <= limit:
            choices = list(itertools.product(*(range(count) for count in options)))
        else:
            first = tuple(0 for _ in options)
            choices = [first, tuple(1 for _ in options)]
            choices += [tuple(int(i == j) for j in range(len(options))) for i in range(len(options))]
            choices += [tuple(int(i != j) for j in range(len(options))) for i in range(len(options))]
            choices += [tuple(rng.randrange(count) for count in options) for _ in range(limit)]
        for choice in choices:
            yield self._outcome(choice)

    def _outcome(self, choice: tuple[int, ...]) -> State:
        disk = self._durable.copy()
        for effect, option in zip(self._pending, choice, strict=True):
            if not effect.entries:
                data = self._now.files[effect.inode]
                torn = data[: len(data) // 2]
                disk.files[effect.inode] = (data, b"", torn, b"\0" * len(data))[option]
            elif option == 0:
                disk.apply(effect)
        return disk.state()

    def _do_acknowledge(self, op: Op) -> None:
        self.acknowledged.append(op.path)

    def _do_mkdir(self, op: Op) -> None:
        self._link(op.path, self._new_inode(None))

    def _do_create(self, op: Op) -> None:
        inode = self._new_inode(b"")
        self._now.files[inode] = op.data
        self._link(op.path, inode)
        if op.data:
            self._pending.append(_Effect(inode))

    def _do_fsync(self, op: Op) -> None:
        inode = self._find(op.path)
        self._durable.files[inode] = self._now.files[inode]
        self._pending = [effect for effect in self._pending if effect.entries or effect.inode != inode]

    def _do_fsync_dir(self, op: Op) -> None:
        directory = self._find(op.path)
        for effect in self._pending:
            if effect.entries and effect.durable_with == directory:
                self._durable.apply(effect)
        self._pending = [e for e in self._pending if not e.entries or e.durable_with != directory]

    def _do_rename(self, op: Op) -> None:
        inode = self._find(op.path)
        source, source_name = self._parent(op.path)
        target, target_name = self._parent(op.target)
        self._change(inode, ((target, target_name, inode), (source, source_name, None)), target)

    def _do_unlink(self, op: Op) -> None:
        directory, name = self._parent(op.path)
        self._change(self._find(op.path), ((directory, name, None),), directory)

    def _link(self, path: str, inode: int) -> None:
        directory, name = self._parent(path)
        self._change(inode, ((directory, name, inode),), directory)

    def _change(self, inode: int, entries: tuple[tuple[int, str, int | None], ...], durable_with: int) -> None:
        effect = _Effect(inode, entries, durable_with)
        self._now.apply(effect)
        self._pending.append(effect)

    def _new_inode(self, data: bytes | None) -> int:
        inode = next(self._next)
        for disk in (self._now, self._durable):
            if data is None:
                disk.directories[inode] = {}
            else:
                disk.files[inode] = data
        return inode

    def _parent(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        return self._find(folder), name

    def _find(self, path: str) -> int:
        inode = 0
        for part in path.split("/") if path not in ("", ".") else ():
            inode = self._now.directories[inode][part]
        return inode


def write_state(state: State, directory: Path) -> None:
    """Put a state on a real disk, so that the real reader can look at it."""
    directory.mkdir()
    for path, data in sorted(state, key=lambda item: item[0]):
        if data is None:
            (directory / path).mkdir()
        else:
            (directory / path).write_bytes(data)
