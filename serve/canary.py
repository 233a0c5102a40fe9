"""Which revision of an alias answers a request, while the alias runs a canary."""

from __future__ import annotations

import hashlib
import secrets
from enum import StrEnum

from registry import Alias


class Arm(StrEnum):
    """The side of the split that a request fell on; a metric label."""

    MAIN = "main"
    CANARY = "canary"


def choose(alias: Alias, user: str | None) -> tuple[str, Arm | None]:
    """The revision for one request, and its arm; ``None`` when the alias runs no canary.

    With ``user`` the choice depends on alias, canary and user only: one end user stays on one revision, on every
    replica, and a larger share keeps those who have the canary already. Another canary draws anew. Without, it is
    random.
    """
    canary = alias.canary
    if canary is None:
        return alias.revision, None
    place = secrets.randbelow(100) if user is None else _place(alias.alias, canary.revision, user)
    return (canary.revision, Arm.CANARY) if place < canary.percent else (alias.revision, Arm.MAIN)


def _place(alias: str, canary: str, user: str) -> int:
    """Where ``user`` stands among a hundred, 0 to 99; names hold no zero byte, so no two triples meet."""
    digest = hashlib.sha256(f"{alias}\0{canary}\0{user}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) % 100
