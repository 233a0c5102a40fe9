"""What a registry may forget: leftovers of dead writers, and old revisions that nothing points to.

A revision stays while anything needs it: an alias serves it; it is where some alias would roll back to; an
alias left it or ended it as its canary a short time ago (requests may still run on it, and an engine may read it
again); it is young (somebody may be about to point to it); or it is the base of an artifact that stays.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from registry.aliases import Alias
from registry.artifacts import Artifact

DEFAULT_MIN_AGE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class GcReport:
    removed_revisions: tuple[str, ...] = ()
    removed_staging: int = 0
    """Directories that dead writers left."""
    removed_trash: int = 0
    """Directories that an earlier removal could not finish."""
    freed_bytes: int = 0


def unneeded(
    artifacts: list[Artifact],
    aliases: list[Alias],
    *,
    keep_unaliased: int,
    min_age_seconds: float,
    now: float,
) -> list[Artifact]:
    """Artifacts to remove so that each name keeps its newest ``keep_unaliased`` revisions beside the needed
    ones.

    ``artifacts`` is in the order of :meth:`registry.artifacts.ArtifactStore.all`: by name, oldest first.
    """
    by_revision = {artifact.revision: artifact for artifact in artifacts}
    needed = {alias.revision for alias in aliases} | {a.canary.revision for a in aliases if a.canary is not None}
    for alias in aliases:
        needed |= _recent_history(alias, by_revision, oldest=now - min_age_seconds)
    needed |= {a.revision for a in artifacts if now - a.manifest.created_at < min_age_seconds}

    spare: dict[str, list[Artifact]] = defaultdict(list)
    for artifact in artifacts:
        if artifact.revision not in needed:
            spare[artifact.name].append(artifact)
    doomed = [a for group in spare.values() for a in group[: max(0, len(group) - keep_unaliased)]]
    return _without_bases_in_use(artifacts, doomed)


def tree_size_bytes(directory: Path) -> int:
    """Bytes of all files below; what vanishes meanwhile counts as nothing."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue
    return total


def _recent_history(alias: Alias, by_revision: dict[str, Artifact], *, oldest: float) -> set[str]:
    """Where the alias would roll back to, and what it left since ``oldest`` (unix seconds)."""
    recent: set[str] = set()
    left_at = alias.updated_at
    has_target = False
    recent |= {entry.revision for entry in alias.ended_canaries if entry.at > oldest}
    for entry in reversed(alias.history):
        is_target = not has_target and entry.revision in by_revision
        has_target = has_target or is_target
        if is_target or left_at > oldest:
            recent.add(entry.revision)
        left_at = entry.at
    return recent


def _without_bases_in_use(artifacts: list[Artifact], doomed: list[Artifact]) -> list[Artifact]:
    """Spare every artifact that a kept one names as its base; repeats, because a base may have a base."""
    while True:
        doomed_revisions = {artifact.revision for artifact in doomed}
        bases = {a.manifest.base_model.id for a in artifacts if a.revision not in doomed_revisions}
        kept = [artifact for artifact in doomed if artifact.revision not in bases]
        if len(kept) == len(doomed):
            return doomed
        doomed = kept
