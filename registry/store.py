"""The registry's front: says what can be done, checks names and rights, and leaves the work to its parts.

Publishing is :mod:`registry.publishing`, flipping aliases :mod:`registry.flips`, taking away
:mod:`registry.removal`, reading and the rules of directories and aliases :mod:`registry.artifacts` and
:mod:`registry.aliases`. Readers need no lock and no write access; what they see changes only under one lock
and by one rename.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from pathlib import Path

from registry.adapter_files import check_adapter, draft_for_adapter
from registry.adapter_source import files_of_adapter
from registry.aliases import Alias, AliasStore, CanaryRequest, Seen
from registry.artifacts import Artifact, ArtifactStore, DamagedArtifact, revision_of
from registry.base_model import BaseModel
from registry.changes import Changes
from registry.durable import Filesystem, storage_errors
from registry.errors import InvalidNameError, ModelNotFoundError, PermissionDeniedError, StorageError
from registry.flips import CheckedFlip, Flips, check_is_not_the_base, revision_reference
from registry.garbage import DEFAULT_MIN_AGE_SECONDS, GcReport
from registry.layout import Layout, check_layout, create_layout
from registry.manifest import ManifestDraft
from registry.names import (
    FineTunedName,
    MutableReference,
    RevisionReference,
    check_digest,
    check_name,
    parse_alias,
    parse_reference,
    shown,
)
from registry.principal import Principal
from registry.publishing import Publisher
from registry.removal import Removal
from registry.staging import StagingArea


class Registry:
    """One registry on a local or shared disk. All methods block on the disk; instances may be shared by
    threads.

    Args of the constructor: ``create`` makes a missing registry; ``read_only`` promises that nothing is ever
    written, so it works on a read-only mount; ``principal``: on whose behalf (see :meth:`on_behalf_of`), not
    given: for the operator, who sees everything; ``filesystem`` and ``clock`` (unix seconds) are for tests.
    """

    def __init__(
        self,
        root: Path,
        *,
        create: bool = True,
        read_only: bool = False,
        principal: Principal | None = None,
        filesystem: Filesystem | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = Path(root).absolute()
        self.read_only = read_only
        self._filesystem = filesystem if filesystem is not None else Filesystem()
        self._clock = clock
        self._layout = Layout(self.root)
        self._principal = principal
        self._artifacts = ArtifactStore(self._layout, self._filesystem, principal)
        self._changes = Changes(self._layout, self._filesystem)
        self._aliases = AliasStore(self._layout, self._filesystem, principal)
        self._staging = StagingArea(self._layout.staging, self._filesystem)
        self._publisher = Publisher(self._filesystem, self._artifacts, self._aliases, self._changes, self._staging)
        self._flips = Flips(self._artifacts, self._aliases, self._changes)
        self._removal = Removal(
            self._layout, self._filesystem, self._artifacts, self._aliases, self._changes, self._staging
        )
        with storage_errors("open the registry"):
            if create and not read_only:
                create_layout(self._layout, self._filesystem)
            else:
                check_layout(self._layout)

    def on_behalf_of(self, principal: Principal) -> Registry:
        """The same registry as one principal sees it.

        What another tenant published is as little there as what nobody did; what is published is the principal's own;
        and it changes and removes only that, unless it may change what belongs to no tenant. Names are one space for
        all tenants: a name that another one has cannot be taken.
        """
        return Registry(
            self.root,
            create=False,
            read_only=self.read_only,
            principal=principal,
            filesystem=self._filesystem,
            clock=self._clock,
        )

    # Publishing

    def stage(self) -> AbstractContextManager[Path]:
        """A fresh directory on the registry's disk, to fill and then publish without another copy.

        What is not published when the context ends is removed; so is, by :meth:`gc`, what a killed process
        left.
        """
        self._require_writable("stage files")
        return self._staging.open()

    def publish(
        self,
        source_dir: Path,
        draft: ManifestDraft,
        *,
        alias: str | None = None,
        fine_tuned_name: str | None = None,
    ) -> Artifact:
        """Make the files of ``source_dir`` an artifact, then point the alias and the ``ft:`` name to it.

        A directory of :meth:`stage` is moved, any other is copied. The files are taken as they are: only
        links, special files, pickles and code are refused here (adapters of unknown origin go through
        :meth:`import_adapter`). Publishing the same content under the same name again returns the artifact
        that is there, so a publisher that was killed half-way may simply repeat. When this returns, the
        artifact survives a power cut; when it raises, readers see what they saw before, or the artifact
        without its aliases.

        Raises:
            InvalidNameError: a name or alias is malformed, reserved, or that of the base model, which would answer
                to it.
            InvalidArtifactError: the directory holds something that no artifact may hold.
            ConflictError: the ``ft:`` name points to something else already.
            StorageError: the disk is full or failing; staged files are removed.
        """
        self._require_writable("publish")
        check_name(draft.name, reserved=[draft.base_model.id])
        targets = [self._new_alias(text) for text in (alias, fine_tuned_name) if text is not None]
        for target in targets:
            check_is_not_the_base(target, draft.base_model.id)
        if fine_tuned_name is not None and not isinstance(targets[-1], FineTunedName):
            raise InvalidNameError(f"{shown(fine_tuned_name)} is not a fine-tuned name; it must start with 'ft:'.")
        if self._principal is not None:
            draft = draft.model_copy(update={"tenant": self._principal.tenant})
        return self._publisher.publish(source_dir, draft, targets, now=self._now())

    def import_adapter(
        self, directory: Path, *, name: str, base_model: BaseModel | None, alias: str | None = None
    ) -> Artifact:
        """Publish a PEFT adapter directory that any tool made, if the engine can serve it.

        Only what makes the adapter is taken (:mod:`registry.adapter_source`). The files are copied first and the copy
        is checked, so the artifact shares no file with its source and nobody can swap one in between. With
        ``base_model`` the shapes are checked against it and its identity is recorded; without, the adapter's base stays
        unknown until serving compares shapes.

        Raises:
            InvalidArtifactError: the directory is no adapter's, or a check of
            :func:`registry.adapter_files.check_adapter` failed; ``code`` says which.
        """
        self._require_writable("import an adapter")
        check_name(name, reserved=[] if base_model is None else [base_model.id])
        with self.stage() as staging:
            with storage_errors(f"copy the adapter '{name}'"):
                for file in files_of_adapter(directory):
                    self._filesystem.copy_file(directory / file, staging / file)
                report = check_adapter(staging, base_model=base_model)
            return self.publish(staging, draft_for_adapter(name, report, base_model), alias=alias)

    # Reading

    def resolve(self, reference: str) -> Artifact:
        """The artifact that an alias, a revision or an ``ft:`` name means now.

        Raises:
            InvalidNameError: the text can be no reference.
            ModelNotFoundError: it means nothing here.
            StorageError: the disk cannot be read.
        """
        parsed = parse_reference(reference)
        with storage_errors(f"read '{reference}'"):
            if isinstance(parsed, RevisionReference):
                return self._artifacts.find(parsed)
            record = self._aliases.require(parsed)
            target = parse_reference(record.revision)
            assert isinstance(target, RevisionReference), record
            return self._artifacts.find(RevisionReference(target.name, record.digest))

    def artifact(self, name: str, digest: str) -> Artifact:
        """The artifact with this name and whole digest.

        Raises:
            InvalidNameError, ModelNotFoundError, StorageError: as :meth:`resolve`.
        """
        reference = RevisionReference(check_name(name), check_digest(digest))
        with storage_errors(f"read '{name}'"):
            return self._artifacts.find(reference)

    def artifacts(self, name: str | None = None) -> list[Artifact]:
        """All artifacts (of one name), by name, then oldest first. What has no valid manifest is left out."""
        return self.survey(name)[0]

    def survey(self, name: str | None = None) -> tuple[list[Artifact], list[DamagedArtifact]]:
        """As :meth:`artifacts`, and the directories that should be such and are not, each with its fault.

        Whose those are, nothing says; so only who may change what belongs to no tenant sees them.
        """
        if name is not None:
            check_name(name)
        with storage_errors("list the artifacts"):
            found, damaged = self._artifacts.survey(name)
        sees_damaged = self._principal is None or self._principal.owns_shared
        return [each for each in found if self._sees(each.manifest.tenant)], damaged if sees_damaged else []

    def alias(self, alias: str) -> Alias:
        """One alias or ``ft:`` name with its history.

        Raises:
            ModelNotFoundError: it is not set.
        """
        parsed = parse_alias(alias)
        with storage_errors(f"read the alias '{alias}'"):
            return self._aliases.require(parsed)

    def aliases(self) -> list[Alias]:
        """All aliases and ``ft:`` names. A damaged alias file is left out."""
        with storage_errors("list the aliases"):
            return [alias for alias in self._aliases.all() if self._sees(alias.tenant)]

    def checkpoints(self, fine_tuned_name: str) -> list[Alias]:
        """The ``…:ckpt-step-<number>`` names of a job's result, whether or not that is published; by step.

        Raises:
            InvalidNameError: that is not the name of a job's result.
        """
        parsed = parse_reference(fine_tuned_name)
        if not isinstance(parsed, FineTunedName) or parsed.checkpoint_step is not None:
            raise InvalidNameError(f"{shown(fine_tuned_name)} is not the fine-tuned name of a job's result.")
        with storage_errors(f"list the checkpoints of '{fine_tuned_name}'"):
            found = {
                step: alias
                for alias in self._aliases.checkpoints_of(parsed)
                if (step := _step_of(alias)) is not None and self._sees(alias.tenant)
            }
        return [found[step] for step in sorted(found)]

    def verify(self, reference: str) -> list[str]:
        """Every problem of an artifact's bytes on disk, one sentence each; empty when it is whole. Reads it
        all.

        Raises:
            ModelNotFoundError: there is not even a directory.
        """
        parsed = parse_reference(reference)
        with storage_errors(f"verify '{reference}'"):
            if not isinstance(parsed, RevisionReference):
                record = self._aliases.require(parsed)
                parsed = RevisionReference(record.revision.partition("@")[0], record.digest)
            digests = self._artifacts.directories(parsed.name, parsed.digest_prefix)
            if not digests:
                raise ModelNotFoundError(f"The model '{parsed.text}' does not exist.", param="model")
            problems = {digest: self._artifacts.verify(parsed.name, digest) for digest in digests}
        if len(digests) == 1:
            return problems[digests[0]]
        return [f"{revision_of(parsed.name, digest)}: {line}" for digest in digests for line in problems[digest]]

    def change_token(self, *, thorough: bool = False) -> Hashable:
        """A value that differs whenever artifacts or aliases changed; see :class:`registry.changes.Changes`.

        Take it before you read what you compare it for. Costs the same whatever the registry holds, and sees what
        registries do. ``thorough`` ones are comparable only among themselves, cost one stat and one listing per
        name and one stat per alias, and also see what was changed by hand.
        """
        with storage_errors("look for changes"):
            return self._changes.scan() if thorough else self._changes.token()

    # Changing what names mean

    def set_alias(
        self,
        alias: str,
        revision: str,
        *,
        canary: CanaryRequest | None = None,
        expected: str | None = None,
        seen: Seen | None = None,
    ) -> Alias:
        """Point ``alias`` (or a new ``ft:`` name) to ``revision``, atomically and durably.

        Without ``canary`` a running one ends. With ``expected``, only if the alias points to that revision at this
        moment; with ``seen``, only if nobody has made it serve something else since.

        Raises:
            ModelNotFoundError: no such revision.
            PermissionDeniedError: an ``ft:`` name of another tenant, or an alias that only the service's own changes.
            ConflictError: the alias points elsewhere than ``expected``, or to something else than was ``seen`` and is
                wanted, or is a ``ft:`` name that is set already.
            InvalidRequestError: a canary for a ``ft:`` name, or one that is the main revision.
        """
        self._require_writable("set an alias")
        target, reference = self._new_alias(alias), revision_reference(revision)
        return self._flips.set(target, reference, canary, expected=expected, seen=seen, now=self._now())

    def check_alias(
        self, alias: str, revision: str, *, canary: CanaryRequest | None = None, expected: str | None = None
    ) -> CheckedFlip:
        """What :meth:`set_alias` would make the alias serve, and what it serves now; writes nothing.

        Raises:
            as :meth:`set_alias`.
        """
        target, reference = self._new_alias(alias), revision_reference(revision)
        with storage_errors(f"read the alias '{alias}'"):
            return self._flips.check(target, reference, canary, expected=expected)

    def rollback_alias(self, alias: str) -> Alias:
        """Undo the alias's last step: end its canary if one runs; else point it to the revision before, and forget
        the present one.

        A canary ends first because the main revision beside it is the one that is known to be good. Revisions of
        the history that were removed meanwhile are skipped. Called again, it goes back further.

        Raises:
            ModelNotFoundError: the alias is not set.
            ConflictError: there is nothing to go back to.
        """
        self._require_writable("roll back an alias")
        return self._flips.roll_back(parse_alias(alias), now=self._now())

    def remove_alias(self, alias: str) -> Alias:
        """Remove an alias or ``ft:`` name; the artifact stays. Returns what was removed.

        Raises:
            ModelNotFoundError: it is not set.
        """
        self._require_writable("remove an alias")
        return self._flips.remove(parse_alias(alias))

    # Removing

    def remove_named(self, alias: str, *, keep: str | None = None) -> None:
        """Remove an alias or ``ft:`` name, and the revisions that it served where nothing else needs them.

        What somebody else owns stays, and so does the revision ``keep``. Who reads meanwhile sees the name with all it
        meant, or nothing of it.

        Raises:
            ModelNotFoundError: it is not set.
            ConflictError: another name cannot be read, so nobody knows what else is served; nothing is removed.
        """
        self._require_writable("remove a model")
        self._removal.remove_named(parse_alias(alias), keep=keep)

    def remove(self, revision: str, force: bool = False) -> None:
        """Remove one revision and its files.

        Aliases that serve it, and artifacts that have it as their base, forbid this. With ``force`` the aliases that
        point to it go with it, those that have it as their canary lose the canary, and such artifacts stay without
        their base.

        Raises:
            ModelNotFoundError: no such revision.
            ConflictError: aliases serve it, or another artifact has it as its base.
        """
        self._require_writable("remove an artifact")
        self._removal.remove(revision_reference(revision), force=force, now=self._now())

    def gc(self, keep_unaliased: int | None = None, *, min_age_seconds: float = DEFAULT_MIN_AGE_SECONDS) -> GcReport:
        """Remove what dead writers left and, unless ``keep_unaliased`` is None, old revisions that nothing
        needs.

        ``keep_unaliased`` is how many of the newest such revisions each name keeps. Revisions younger than
        ``min_age_seconds``, and those that an alias left within that time, always stay; so do rollback
        targets and bases. Never touches what somebody is publishing.
        """
        self._require_writable("collect garbage")
        return self._removal.gc(keep_unaliased=keep_unaliased, min_age_seconds=min_age_seconds, now=self._clock())

    # Inside

    def _new_alias(self, text: str) -> MutableReference:
        alias = parse_alias(text)
        if not isinstance(alias, FineTunedName):
            check_name(alias.name)
        elif self._principal is not None and alias.organization != self._principal.tenant:
            # Names of results say whose they are, and who was let use one by its name relies on that.
            raise PermissionDeniedError(
                f"'{alias.text}' is a name of {alias.organization!r}, and only its models may have it. Yours are "
                f"ft:<base>:{self._principal.tenant}:...",
                code="foreign_organization",
                param="alias",
            )
        self._layout.alias(alias)
        return alias

    def _sees(self, tenant: str | None) -> bool:
        return self._principal is None or self._principal.sees(tenant)

    def _now(self) -> int:
        return int(self._clock())

    def _require_writable(self, action: str) -> None:
        if self.read_only:
            raise StorageError(
                f"This registry is open read-only, so it cannot {action}. Open it writable where tuning runs.",
                code="registry_is_read_only",
            )


def _step_of(alias: Alias) -> int | None:
    name = parse_alias(alias.alias)
    return name.checkpoint_step if isinstance(name, FineTunedName) else None
