"""The mutable half of a registry: aliases, each one small JSON file that is replaced as a whole.

A flip is one rename, so a reader sees the old revision or the new one. Writers hold the registry's lock and
may compare before they set. Fine-tuned names (``ft:``) are aliases that are set once. An alias may run a canary: a
second revision that answers a share of its requests; who gets which is decided where requests are served.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from registry.artifacts import Artifact
from registry.durable import Filesystem, replace_file
from registry.errors import (
    ConflictError,
    InvalidArtifactError,
    InvalidNameError,
    InvalidRequestError,
    ModelNotFoundError,
    PermissionDeniedError,
)
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
from registry.principal import Principal

HISTORY_LENGTH = 20
_MAX_ALIAS_BYTES = 64 << 10


class HistoryEntry(Record):
    revision: str
    at: Count
    """Unix seconds when the alias was set to this revision."""
    was_shared: bool = False
    """The alias was shared by all then, and what came next made it a tenant's."""


class Canary(Record):
    revision: str
    digest: Sha256
    percent: Annotated[int, Field(ge=1, le=99)]
    """How many of a hundred requests to the alias go to this revision."""
    was_shared: bool = False
    """The alias was shared by all without it."""


class Alias(Record):
    alias: str
    revision: str
    digest: Sha256
    history: list[HistoryEntry]
    """Earlier revisions, oldest first, at most 20. A rollback takes from the end."""
    write_once: bool
    updated_at: Count
    """Unix seconds when the alias was set to its present revision; a canary that begins or ends leaves it alone."""
    tenant: str | None = None
    """Whose it is; nobody else sees it. None: it is shared by all."""
    canary: Canary | None = None
    ended_canaries: list[HistoryEntry] = Field(default_factory=list)
    """Canaries that were taken away, each with the time of its end, oldest first, at most 20. Nothing rolls back to
    them; they are kept so that garbage collection spares what ran a moment ago."""

    def serves(self, digest: str) -> bool:
        """Whether requests to the alias may reach the artifact with this digest."""
        return digest == self.digest or (self.canary is not None and digest == self.canary.digest)


@dataclass(frozen=True, slots=True)
class Seen:
    """An alias as somebody saw it who decided upon that what it is to become."""

    alias: Alias | None
    """``None``: it was not set."""

    def is_still(self, present: Alias | None) -> bool:
        return _served(self.alias) == _served(present)


@dataclass(frozen=True, slots=True)
class CanaryRequest:
    """The canary that a caller wants beside an alias's main revision.

    Raises:
        InvalidRequestError: a share that is none.
    """

    revision: str
    percent: int

    def __post_init__(self) -> None:
        if not 1 <= self.percent <= 99:
            raise InvalidRequestError(
                f"A canary takes 1 to 99 percent of an alias's requests, got {self.percent}. For all of them, set the "
                "alias to its revision; for none, set the alias without a canary.",
                param="canary",
            )


class AliasStore:
    """Reads need no lock. Whoever calls ``put`` or ``remove`` holds the registry's lock.

    ``principal``: on whose behalf; what it does not see is not there, and what it does not own it cannot change.
    """

    def __init__(self, layout: Layout, filesystem: Filesystem, principal: Principal | None = None) -> None:
        self._layout = layout
        self._filesystem = filesystem
        self._principal = principal

    def get(self, alias: MutableReference) -> Alias | None:
        """The alias, or None if it is not set.

        Raises:
            InvalidArtifactError: its file is damaged.
        """
        record = self._get(alias)
        is_foreign = record is not None and self._principal is not None and not self._principal.sees(record.tenant)
        return None if is_foreign else record

    def _get(self, alias: MutableReference) -> Alias | None:
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

    def require_own(self, alias: MutableReference) -> Alias:
        """The alias, if it may be changed.

        Raises:
            ModelNotFoundError: it is not set.
            PermissionDeniedError: it is shared by all, and only the service's own tenant may change that.
        """
        record = self.require(alias)
        if self._principal is not None and not self._principal.owns(record.tenant):
            raise PermissionDeniedError(
                f"The name '{alias.text}' is shared by all tenants, so only the service's own may change it.",
                code="shared_model",
                param="model",
            )
        return record

    def all(self, *, skip_damaged: bool = True) -> list[Alias]:
        """All aliases by name; ``skip_damaged`` leaves out those that cannot be read.

        Raises:
            InvalidArtifactError, PermissionError: one cannot, and ``skip_damaged`` is false.
        """
        with os.scandir(self._layout.aliases) as entries:
            paths = sorted(
                Path(entry.path) for entry in entries if entry.name.endswith(".json") and entry.name[0] != "."
            )
        return self._read_all(paths, skip_damaged=skip_damaged)

    def checkpoints_of(self, name: FineTunedName) -> list[Alias]:
        """Names of the checkpoints of a fine-tuned name, in no order. Damaged ones are left out."""
        stem = alias_file_stem(replace(name, checkpoint_step=0)).removesuffix("0")
        return self._read_all(list(self._layout.aliases.glob(f"{stem}*.json")), skip_damaged=True)

    def _read_all(self, paths: Iterable[Path], *, skip_damaged: bool) -> list[Alias]:
        found: list[Alias] = []
        for path in paths:
            try:
                found.append(_read(path))
            except FileNotFoundError:
                continue  # removed since the listing
            except (InvalidArtifactError, PermissionError):
                if not skip_damaged:
                    raise
        return found

    def check(
        self,
        alias: MutableReference,
        artifact: Artifact,
        *,
        canary: Canary | None = None,
        expected: str | None,
        seen: Seen | None = None,
    ) -> Alias | None:
        """The present record, after making sure that the alias may be set to ``artifact`` with this canary.

        Raises:
            ConflictError: it does not point to ``expected``, or has changed since it was ``seen`` and is not what it
                is to become; it is write-once and points elsewhere, or it is another tenant's.
            PermissionDeniedError: it is shared, and not this one's to change.
            InvalidRequestError: it can take no canary, or not this one.
        """
        present = self._get(alias)
        if present is not None and self._principal is not None and not self._principal.owns(present.tenant):
            if self._principal.sees(present.tenant):
                self.require_own(alias)
            raise ConflictError(f"The name '{alias.text}' is taken. Choose another one.", code="alias_taken")
        now = "is not set" if present is None else f"points to '{present.revision}'"
        if expected is not None and not _is_revision(present, expected):
            raise ConflictError(
                f"The alias '{alias.text}' {now}, not to '{expected}'. Somebody changed it; look again, then retry.",
                code="alias_changed",
            )
        wanted = (artifact.digest, None if canary is None else (canary.digest, canary.percent))
        if seen is not None and not seen.is_still(present) and _served(present) != wanted:
            raise ConflictError(
                f"The alias '{alias.text}' {now} by now. Somebody changed it meanwhile; look again, then retry.",
                code="alias_changed",
            )
        if present is not None and present.write_once and present.digest != artifact.digest:
            raise ConflictError(
                f"The name '{alias.text}' is write-once and points to '{present.revision}'. "
                "Use a plain alias for something that changes.",
                code="alias_is_write_once",
            )
        if canary is not None:
            _check_canary(alias, artifact, canary)
        return present

    def put(
        self,
        alias: MutableReference,
        artifact: Artifact,
        *,
        canary: Canary | None = None,
        canary_tenant: str | None = None,
        expected: str | None,
        seen: Seen | None = None,
        now: int,
    ) -> Alias:
        """Point the alias to the artifact, with this canary or none, durably. Setting what is set changes nothing.

        It becomes the tenant's whose revisions it serves, until it is rolled back.
        """
        tenant = self._tenant_of(artifact, canary_tenant)
        present = self.check(alias, artifact, canary=canary, expected=expected, seen=seen)
        if canary is not None and tenant is not None and self._tenant_of(artifact, None) is None:
            canary = canary.model_copy(update={"was_shared": True})
        if present is None:
            record = Alias(
                alias=alias.text,
                revision=artifact.revision,
                digest=artifact.digest,
                history=[],
                write_once=isinstance(alias, FineTunedName),
                updated_at=now,
                tenant=tenant,
                canary=canary,
            )
        else:
            record = _moved(present, artifact, canary, tenant, now)
        return record if record == present else self._write(alias, record)

    def _tenant_of(self, artifact: Artifact, canary_tenant: str | None) -> str | None:
        tenants = {tenant for tenant in (artifact.manifest.tenant, canary_tenant) if tenant is not None}
        if len(tenants) > 1:
            raise InvalidRequestError(
                f"The canary is another tenant's than '{artifact.revision}'. An alias serves one tenant's models.",
                param="canary",
            )
        if tenants:
            return tenants.pop()
        # A tenant's own name for a model that all share is its own.
        return None if self._principal is None or self._principal.owns_shared else self._principal.tenant

    def put_back(
        self, alias: MutableReference, present: Alias, artifact: Artifact, history: list[HistoryEntry], now: int
    ) -> Alias:
        """Point the alias to an earlier artifact and keep only the history before it. It is whose it was then."""
        update: dict[str, object] = {"revision": artifact.revision, "digest": artifact.digest, "updated_at": now}
        if artifact.manifest.tenant is not None:
            update["tenant"] = artifact.manifest.tenant
        elif present.history[len(history)].was_shared:
            update["tenant"] = None
        return self._write(alias, present.model_copy(update=update | {"history": history}))

    def end_canary(self, alias: MutableReference, present: Alias, now: int) -> Alias:
        """Send every request of the alias to its main revision again. It is whose it was without the canary."""
        update: dict[str, object] = {"canary": None, "ended_canaries": _ended(present, now)}
        if present.canary is not None and present.canary.was_shared:
            update["tenant"] = None
        return self._write(alias, present.model_copy(update=update))

    def remove(self, alias: MutableReference) -> None:
        path = self._layout.alias(alias)
        self._filesystem.remove_file(path)
        self._filesystem.fsync_dir(path.parent)

    def _write(self, alias: MutableReference, record: Alias) -> Alias:
        # Without defaults: a file that needs no newer field is one that an older Capo reads.
        document = record.model_dump(mode="json", exclude_defaults=True)
        data = json.dumps(document, sort_keys=True, indent=1).encode("ascii")
        replace_file(self._filesystem, self._layout.alias(alias), data)
        return record


def _check_canary(alias: MutableReference, artifact: Artifact, canary: Canary) -> None:
    if isinstance(alias, FineTunedName):
        raise InvalidRequestError(
            f"The name '{alias.text}' is write-once, so it can take no canary. Use a plain alias.",
            code="alias_is_write_once",
            param="canary",
        )
    if canary.digest == artifact.digest:
        raise InvalidRequestError(
            f"The canary '{canary.revision}' is the alias's main revision. Give two different revisions.",
            param="canary",
        )


def _served(alias: Alias | None) -> tuple[str, tuple[str, int] | None] | None:
    """What requests to it may reach, and how many of them."""
    if alias is None:
        return None
    return alias.digest, None if alias.canary is None else (alias.canary.digest, alias.canary.percent)


def _moved(present: Alias, artifact: Artifact, canary: Canary | None, tenant: str | None, now: int) -> Alias:
    update: dict[str, object] = {"canary": canary, "tenant": tenant}
    serving_on = {artifact.revision} | ({canary.revision} if canary is not None else set())
    if present.canary is not None and present.canary.revision not in serving_on:
        update["ended_canaries"] = _ended(present, now)
    if present.revision != artifact.revision:
        is_shared = present.tenant is None or (present.canary is not None and present.canary.was_shared)
        last = HistoryEntry(
            revision=present.revision, at=present.updated_at, was_shared=is_shared and tenant is not None
        )
        history = [*present.history, last][-HISTORY_LENGTH:]
        update |= {"revision": artifact.revision, "digest": artifact.digest, "history": history, "updated_at": now}
    return present.model_copy(update=update)


def _ended(present: Alias, now: int) -> list[HistoryEntry]:
    if present.canary is None:
        return present.ended_canaries
    return [*present.ended_canaries, HistoryEntry(revision=present.canary.revision, at=now)][-HISTORY_LENGTH:]


def _read(path: Path) -> Alias:
    data = read_limited(path, _MAX_ALIAS_BYTES)
    with suppress(ValidationError, InvalidNameError):
        record = Alias.model_validate_json(data)
        if (
            alias_file_stem(parse_alias(record.alias)) == path.name.removesuffix(".json")
            and _belong_together(record.revision, record.digest)
            and (record.canary is None or _belong_together(record.canary.revision, record.canary.digest))
        ):
            return record
    raise InvalidArtifactError(f"The alias file {path.name!r} is damaged. Set the alias again.", code="invalid_alias")


def _belong_together(revision: str, digest: str) -> bool:
    reference = parse_reference(revision)
    return isinstance(reference, RevisionReference) and digest.startswith(reference.digest_prefix)


def _is_revision(present: Alias | None, expected: str) -> bool:
    reference = parse_reference(expected)
    if not isinstance(reference, RevisionReference):
        raise InvalidNameError(f"'{expected}' is not a revision; compare an alias with a revision.", param="expected")
    return (
        present is not None
        and present.revision.startswith(f"{reference.name}@")
        and present.digest.startswith(reference.digest_prefix)
    )
