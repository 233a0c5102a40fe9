"""Where things lie under a registry's root, and the file that marks a directory as a registry.

registry.json                    format and schema version; written last when a registry is made
registry.lock                    writers hold its flock while they change what readers see
generation                       random text, replaced before and after every change; see registry/changes.py
artifacts/<name>/<sha256>/       one immutable artifact: files and manifest.json
aliases/<encoded alias>.json     one alias
staging/<uuid>/, <uuid>.lock     being written; the writer holds the lock's flock
trash/                           renamed here first, then deleted
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from registry.durable import TEMPORARY_PREFIX, Filesystem, replace_file
from registry.errors import ConflictError, InvalidArtifactError, NotFoundError, UnavailableError
from registry.files import read_limited
from registry.names import MutableReference, alias_file_stem
from registry.strict_json import parse_strict_json

FORMAT = "capo-registry"
SCHEMA_VERSION = 1

_MARKER = json.dumps({"format": FORMAT, "schema_version": SCHEMA_VERSION}, sort_keys=True).encode()
_MAX_MARKER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Layout:
    root: Path

    @property
    def marker(self) -> Path:
        return self.root / "registry.json"

    @property
    def lock(self) -> Path:
        return self.root / "registry.lock"

    @property
    def generation(self) -> Path:
        return self.root / "generation"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def aliases(self) -> Path:
        return self.root / "aliases"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    def artifact(self, name: str, digest: str) -> Path:
        return self.artifacts / name / digest

    def alias(self, alias: MutableReference) -> Path:
        return self.aliases / f"{alias_file_stem(alias)}.json"


def create_layout(layout: Layout, filesystem: Filesystem) -> None:
    """Make an empty registry at the root; fine if one is there or another process makes one right now.

    Raises:
        ConflictError: the root holds files that are not a registry's.
        InvalidArtifactError: a registry of another format version is there.
        OSError: the disk refused.
    """
    if layout.marker.exists():
        check_layout(layout)
        return
    _make_root(layout.root, filesystem)
    folders = (layout.artifacts, layout.aliases, layout.staging, layout.trash)
    _refuse_foreign_files(layout, {folder.name for folder in folders} | {layout.lock.name})
    lock = filesystem.lock(layout.lock, wait_seconds=60)
    if lock is None:
        raise UnavailableError(f"Another process has been making a registry at {layout.root} for a minute.")
    try:
        if layout.marker.exists():
            return
        for folder in folders:
            filesystem.mkdir(folder)
        for folder in (layout.artifacts, layout.aliases):
            filesystem.let_in_readers(folder)
        filesystem.fsync_dir(layout.root)
        replace_file(filesystem, layout.marker, _MARKER)
    finally:
        lock.release()


def check_layout(layout: Layout) -> None:
    """Whether the root holds a registry that this version understands.

    Raises:
        NotFoundError: no registry is there.
        InvalidArtifactError: it has another format or version.
    """
    try:
        data = read_limited(layout.marker, _MAX_MARKER_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"There is no registry at {layout.root}. Open it once with create=True, or check the path.",
            code="registry_not_found",
        ) from error
    try:
        parsed = parse_strict_json(data)
    except ValueError:
        parsed = None
    if parsed != {"format": FORMAT, "schema_version": SCHEMA_VERSION}:
        raise InvalidArtifactError(
            f"{layout.marker} says {data[:100]!r}; this Capo reads {_MARKER.decode()}. "
            "Use the version of Capo that made this registry, or a newer one.",
            code="unsupported_registry_format",
        )


def _refuse_foreign_files(layout: Layout, ours: set[str]) -> None:
    foreign = sorted(
        entry.name
        for entry in layout.root.iterdir()
        if entry.name not in ours and not entry.name.startswith(TEMPORARY_PREFIX)
    )
    # Asked after the listing: a process beside us may have finished making the registry meanwhile.
    if foreign and not layout.marker.exists():
        raise ConflictError(
            f"{layout.root} is no registry and not empty (it holds {foreign[0]!r}). Give an empty directory.",
            code="not_a_registry",
        )


def _make_root(root: Path, filesystem: Filesystem) -> None:
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    for folder in reversed(missing):
        filesystem.mkdir(folder)
        filesystem.fsync_dir(folder.parent)
