"""One job for one ``Idempotency-Key``, however often the request comes.

The key is entered in the transaction that makes the job, so there is never one without the other; of two requests
at the same moment the database lets one in, and the other finds its job.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from registry.errors import ConflictError, InvalidRequestError
from tune.jobs.schema import idempotency_keys

KEPT_SECONDS = 24 * 3600
"""Afterwards a key is new again; clients retry within minutes."""
MAX_KEY_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A request that its client may repeat."""

    key: str
    digest: str
    """Of the body: the same key with another one is a mistake of the client."""

    @classmethod
    def of(cls, key: str, body: bytes) -> Idempotency:
        """Raises :class:`InvalidRequestError` for a key that cannot be."""
        if not key or len(key) > MAX_KEY_CHARACTERS or not (key.isascii() and key.isprintable()):
            raise InvalidRequestError(
                f"Idempotency-Key must have 1 to {MAX_KEY_CHARACTERS} printable ASCII characters",
                code="invalid_idempotency_key",
            )
        return cls(key, hashlib.sha256(body).hexdigest())


def find_job(connection: Connection, asked: Idempotency, *, now: float) -> str | None:
    """The id of the job that the key made. Raises :class:`ConflictError` if that was another request."""
    row = connection.execute(
        select(idempotency_keys).where(
            idempotency_keys.c.key == asked.key, idempotency_keys.c.created_at > now - KEPT_SECONDS
        )
    ).one_or_none()
    if row is None:
        return None
    if row.digest != asked.digest:
        raise ConflictError(
            f"the Idempotency-Key {asked.key[:80]!r} was used with another body, which made {row.job_id}; "
            "send that body again, or a new key",
            code="idempotency_key_reused",
        )
    return str(row.job_id)


def enter(connection: Connection, asked: Idempotency, job_id: str, *, now: float) -> None:
    """Keep the key, and forget old ones."""
    connection.execute(delete(idempotency_keys).where(idempotency_keys.c.created_at <= now - KEPT_SECONDS))
    values = {"key": asked.key, "digest": asked.digest, "job_id": job_id, "created_at": int(now)}
    connection.execute(insert(idempotency_keys).values(**values))
