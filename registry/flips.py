"""Changing what an alias serves: its main revision, its canary, one step back, or gone."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from registry.aliases import Alias, AliasStore, Canary, CanaryRequest, Seen
from registry.artifacts import Artifact, ArtifactStore
from registry.changes import Changes
from registry.errors import ConflictError, InvalidNameError, ModelNotFoundError
from registry.names import FineTunedName, MutableReference, RevisionReference, check_name, parse_reference, shown


@dataclass(frozen=True, slots=True)
class CheckedFlip:
    """A flip that was allowed when it was looked at."""

    artifacts: list[Artifact]
    """What the alias would serve, the main revision first."""
    seen: Seen


class Flips:
    """The form of names is checked already, ``now`` is in unix seconds."""

    def __init__(self, artifacts: ArtifactStore, aliases: AliasStore, changes: Changes) -> None:
        self._artifacts = artifacts
        self._aliases = aliases
        self._changes = changes

    def set(
        self,
        alias: MutableReference,
        revision: RevisionReference,
        canary: CanaryRequest | None,
        *,
        expected: str | None,
        seen: Seen | None,
        now: int,
    ) -> Alias:
        """See :meth:`registry.store.Registry.set_alias`."""
        with self._changes.one(f"set the alias '{alias.text}'"):
            artifact, running = self._found(alias, revision, canary)
            return self._aliases.put(
                alias,
                artifact,
                canary=_record(canary, running),
                canary_tenant=None if running is None else running.manifest.tenant,
                expected=expected,
                seen=seen,
                now=now,
            )

    def check(
        self,
        alias: MutableReference,
        revision: RevisionReference,
        canary: CanaryRequest | None,
        *,
        expected: str | None,
    ) -> CheckedFlip:
        """See :meth:`registry.store.Registry.check_alias`."""
        artifact, running = self._found(alias, revision, canary)
        present = self._aliases.check(alias, artifact, canary=_record(canary, running), expected=expected)
        return CheckedFlip([artifact] if running is None else [artifact, running], Seen(present))

    def roll_back(self, alias: MutableReference, *, now: int) -> Alias:
        """See :meth:`registry.store.Registry.rollback_alias`."""
        with self._changes.one(f"roll back the alias '{alias.text}'"):
            present = self._aliases.require_own(alias)
            if present.canary is not None:
                return self._aliases.end_canary(alias, present, now)
            for index in reversed(range(len(present.history))):
                with suppress(ModelNotFoundError):
                    artifact = self._artifacts.find(revision_reference(present.history[index].revision))
                    if artifact.digest == present.digest:
                        continue  # what was between them was removed
                    return self._aliases.put_back(alias, present, artifact, present.history[:index], now)
        raise ConflictError(
            f"The alias '{alias.text}' has no earlier revision that still exists. Set it to a revision instead.",
            code="no_earlier_revision",
        )

    def remove(self, alias: MutableReference) -> Alias:
        """See :meth:`registry.store.Registry.remove_alias`."""
        with self._changes.one(f"remove the alias '{alias.text}'"):
            removed = self._aliases.require_own(alias)
            self._aliases.remove(alias)
        return removed

    def _found(
        self, alias: MutableReference, revision: RevisionReference, canary: CanaryRequest | None
    ) -> tuple[Artifact, Artifact | None]:
        artifact = self._artifacts.find(revision)
        check_is_not_the_base(alias, artifact.manifest.base_model.id)
        return artifact, None if canary is None else self._artifacts.find(revision_reference(canary.revision))


def check_is_not_the_base(alias: MutableReference, base_model_id: str) -> None:
    """A base model answers to its id itself, so an alias of that name could never be called.

    Raises:
        InvalidNameError: ``alias`` has that name.
    """
    if not isinstance(alias, FineTunedName):
        check_name(alias.name, reserved=[base_model_id])


def revision_reference(text: str) -> RevisionReference:
    """``text`` as a revision.

    Raises:
        InvalidNameError: it is something else.
    """
    reference = parse_reference(text)
    if not isinstance(reference, RevisionReference):
        raise InvalidNameError(f"{shown(text)} is not a revision. Give <name>@<digits of its digest>.")
    return reference


def _record(canary: CanaryRequest | None, artifact: Artifact | None) -> Canary | None:
    if canary is None or artifact is None:
        return None
    return Canary(revision=artifact.revision, digest=artifact.digest, percent=canary.percent)
