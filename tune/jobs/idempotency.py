"""One thing made for one ``Idempotency-Key``, however often the request comes.

The key is entered in the transaction that makes the thing, so there is never one without the other; of two requests
at the same moment the database lets one in, and the other finds what was made. Keys of two tenants never meet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select
from sqlalchemy.exc import IntegrityError

from registry.errors import ConflictError, InvalidRequestError
from tune.jobs.database import Database
from tune.jobs.schema import idempotency_keys

KEPT_SECONDS = 24 * 3600
"""Afterwards a key is new again; clients retry within minutes."""
MAX_KEY_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A request that its client may repeat."""

    key: str
    digest: str
    """Of what is asked for: the same key with another body is a mistake of the client."""

    @classmethod
    def of(cls, key: str, body: bytes, *, making: str = "fine_tuning.job") -> Idempotency:
        """``making``: what kind of thing is asked for. Raises :class:`InvalidRequestError` for a key that cannot be."""
        if not key or len(key) > MAX_KEY_CHARACTERS or not (key.isascii() and key.isprintable()):
            raise InvalidRequestError(
                f"Idempotency-Key must have 1 to {MAX_KEY_CHARACTERS} printable ASCII characters",
                code="invalid_idempotency_key",
            )
        return cls(key, hashlib.sha256(making.encode() + b"\0" + body).hexdigest())


def find_made(connection: Connection, asked: Idempotency, *, tenant: str, now: float) -> str | None:
    """The id of what the key made. Raises :class:`ConflictError` if that was another request."""
    row = connection.execute(
        select(idempotency_keys).where(
            idempotency_keys.c.tenant == tenant,
            idempotency_keys.c.key == asked.key,
            idempotency_keys.c.created_at > now - KEPT_SECONDS,
        )
    ).one_or_none()
    if row is None:
        return None
    if row.digest != asked.digest:
        raise ConflictError(
            f"the Idempotency-Key {asked.key[:80]!r} was used with another request, which made {row.made_id}; "
            "send that request again, or a new key",
            code="idempotency_key_reused",
        )
    return str(row.made_id)


def enter(connection: Connection, asked: Idempotency, made_id: str, *, tenant: str, now: float) -> None:
    """Keep the key, and forget old ones."""
    connection.execute(delete(idempotency_keys).where(idempotency_keys.c.created_at <= now - KEPT_SECONDS))
    values = {"tenant": tenant, "key": asked.key, "digest": asked.digest, "made_id": made_id, "created_at": int(now)}
    connection.execute(insert(idempotency_keys).values(**values))


def forget(connection: Connection, asked: Idempotency, made_id: str, *, tenant: str) -> None:
    """The key is new again, unless it means something else than ``made_id`` meanwhile: with PostgreSQL another request
    may have made it anew since this one looked."""
    table = idempotency_keys
    connection.execute(
        delete(table).where(table.c.tenant == tenant, table.c.key == asked.key, table.c.made_id == made_id)
    )


def make_once(
    database: Database,
    asked: Idempotency | None,
    make: Callable[[Connection], str],
    *,
    tenant: str,
    now: float,
    is_there: Callable[[Connection, str], bool] = lambda _connection, _made_id: True,
) -> str:
    """The id of what ``make`` enters in one write transaction, or of what the same request made before.

    What is not there any more (``is_there``) is made anew, and the key then means the new one.

    Raises:
        ConflictError: the key made something else.
    """
    try:
        with database.write() as connection:
            if asked is not None and (made := find_made(connection, asked, tenant=tenant, now=now)) is not None:
                if is_there(connection, made):
                    return made
                forget(connection, asked, made, tenant=tenant)
            made_id = make(connection)
            if asked is not None:
                enter(connection, asked, made_id, tenant=tenant, now=now)
            return made_id
    except IntegrityError:
        if asked is None:
            raise
        with database.read() as connection:
            made = find_made(connection, asked, tenant=tenant, now=now)
        if made is None:
            raise
        return made
