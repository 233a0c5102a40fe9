"""The mutable half of a registry: aliases, each one small JSON file that is replaced as a whole.

A flip is one rename, so a reader sees the old revision or the new one. Writers hold the registry's lock and
may compare before they set. Fine-tuned names (``ft:``) are aliases that are set once.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from registry.artifacts import Artifact
from registry.durable import Filesystem, replace_file
from registry.errors import ConflictError, InvalidArtifactError, InvalidNameError, ModelNotFoundError
from registry.files import read_limited
from registry.layout import Layout
from registry.manifest import Count, Record, Sha256
from registry.names import (
    FineTunedName,
    MutableReference,
    RevisionReference,
    alias_file_stem,
    parse_alias,
    parse_reference,
)

HISTORY_LENGTH = 20
_MAX_ALIAS_BYTES = 64 << 10


class HistoryEntry(Record):
    revision: str
    at: Count
    """Unix seconds when the alias was set to this revision."""


class Alias(Record):
    alias: str
    revision: str
    digest: Sha256
    history: list[HistoryEntry]
    """Earlier revisions, oldest first, at most 20. A rollback takes from the end."""
    write_once: bool
    updated_at: Count
    """Unix seconds when the alias was set to its present revision."""


class AliasStore:
    """Reads need no lock. Whoever calls ``put`` or ``remove`` holds the registry's lock."""

    def __init__(self, layout: Layout, filesystem: Filesystem) -> None:
        self._layout = layout
        self._filesystem = filesystem

    def get(self, alias: MutableReference) -> Alias | None:
        """The alias, or None if it is not set.

        Raises:
            InvalidArtifactError: its file is damaged.
        """
        try:
            return _read(self._layout.alias(alias))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def require(self, alias: MutableReference) -> Alias:
        """The alias.

        Raises:
            ModelNotFoundError: it is not set.
        """
        record = self.get(alias)
        if record is None:
            raise ModelNotFoundError(
                f"The model '{alias.text}' does not exist. List the models to see which do.", param="model"
            )
        return record

    def all(self, *, skip_damaged: bool = True) -> list[Alias]:
        """All aliases by name.

        Raises:
            InvalidArtifactError: a file is damaged and ``skip_damaged`` is false.
        """
        with os.scandir(self._layout.aliases) as entries:
            paths = sorted(
                Path(entry.path) for entry in entries if entry.name.endswith(".json") and entry.name[0] != "."
            )
        found: list[Alias] = []
        for path in paths:
            try:
                found.append(_read(path))
            except FileNotFoundError:
                continue  # removed since the listing
            except InvalidArtifactError:
                if not skip_damaged:
                    raise
        return found

    def check(self, alias: MutableReference, artifact: Artifact, *, expected: str | None) -> Alias | None:
        """The present record, after making sure that the alias may be set to ``artifact``.

        Raises:
            ConflictError: it does not point to ``expected``, or it is write-once and points elsewhere.
        """
        present = self.get(alias)
        if expected is not None and not _is_revision(present, expected):
            now = "is not set" if present is None else f"points to '{present.revision}'"
            raise ConflictError(
                f"The alias '{alias.text}' {now}, not to '{expected}'. Somebody changed it; look again, then retry.",
                code="alias_changed",
            )
        if present is not None and present.write_once and present.digest != artifact.digest:
            raise ConflictError(
                f"The name '{alias.text}' is write-once and points to '{present.revision}'. "
                "Use a plain alias for something that changes.",
                code="alias_is_write_once",
            )
        return present

    def put(self, alias: MutableReference, artifact: Artifact, *, expected: str | None, now: int) -> Alias:
        """Point the alias to the artifact, durably. Setting it to what it points to changes nothing."""
        present = self.check(alias, artifact, expected=expected)
        if present is not None and present.revision == artifact.revision:
            return present
        history: list[HistoryEntry] = []
        if present is not None:
            last = HistoryEntry(revision=present.revision, at=present.updated_at)
            history = [*present.history, last][-HISTORY_LENGTH:]
        return self._write(alias, artifact, history, now)

    def put_back(self, alias: MutableReference, artifact: Artifact, history: list[HistoryEntry], now: int) -> Alias:
        """Point the alias to an earlier artifact and keep only the history before it."""
        return self._write(alias, artifact, history, now)

    def remove(self, alias: MutableReference) -> None:
        path = self._layout.alias(alias)
        self._filesystem.remove_file(path)
        self._filesystem.fsync_dir(path.parent)

    def _write(self, alias: MutableReference, artifact: Artifact, history: list[HistoryEntry], now: int) -> Alias:
        record = Alias(
            alias=alias.text,
            revision=artifact.revision,
            digest=artifact.digest,
            history=history,
            write_once=isinstance(alias, FineTunedName),
            updated_at=now,
        )
        data = json.dumps(record.model_dump(mode="json"), sort_keys=True, indent=1).encode("ascii")
        replace_file(self._filesystem, self._layout.alias(alias), data)
        return record


def _read(path: Path) -> Alias:
    data = read_limited(path, _MAX_ALIAS_BYTES)
    with suppress(ValidationError, InvalidNameError):
        record = Alias.model_validate_json(data)
        revision = parse_reference(record.revision)
        if (
            alias_file_stem(parse_alias(record.alias)) == path.name.removesuffix(".json")
            and isinstance(revision, RevisionReference)
            and record.digest.startswith(revision.digest_prefix)
        ):
            return record
    raise InvalidArtifactError(f"The alias file {path.name!r} is damaged. Set the alias again.", code="invalid_alias")


def _is_revision(present: Alias | None, expected: str) -> bool:
    reference = parse_reference(expected)
    if not isinstance(reference, RevisionReference):
        raise InvalidNameError(f"'{expected}' is not a revision; compare an alias with a revision.", param="expected")
    return (
        present is not None
        and present.revision.startswith(f"{reference.name}@")
        and present.digest.startswith(reference.digest_prefix)
    )
