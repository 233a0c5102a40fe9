"""A key as the store keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from registry.principal import Scope


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Bounds of one key in one process; ``None``: none."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and completion tokens, as the engine counted them."""
    concurrency: int | None = None
    """Requests at once."""


@dataclass(frozen=True, slots=True)
class NewKey:
    tenant: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None = None
    """Names that inference may call; ``None``: every one that the tenant sees."""
    limits: KeyLimits = KeyLimits()
    expires_at: int | None = None


@dataclass(frozen=True, slots=True)
class KeyRecord:
    id: str
    tenant: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None
    limits: KeyLimits
    digest: str
    """See :func:`capo.keys.secret.digest_of`."""
    previous_digest: str | None
    """Of the secret before the last rotation, which is good until :attr:`previous_until`."""
    previous_until: int | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None

    def refusal(self, now: float) -> str | None:
        """Why the key is good for nothing any more; ``None``: it is good."""
        if self.revoked_at is not None:
            return "was revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "has expired"
        return None

    def digests(self, now: float) -> list[str]:
        """Of the secrets that are good now."""
        if self.previous_digest is None or self.previous_until is None or self.previous_until <= now:
            return [self.digest]
        return [self.digest, self.previous_digest]
