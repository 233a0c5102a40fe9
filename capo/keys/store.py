"""The keys in the job store's database. Every method is one transaction and blocks.

A revoked key keeps its row: its id stays taken, a list can show it, and a store that ever had a key never looks as if
it had none, which would open the door.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Row, insert, select, update

from capo.keys.records import KeyLimits, KeyRecord, NewKey
from capo.keys.secret import Secret, new_secret
from registry import check_name, errors, parse_reference
from registry.names import check_base_model_id
from registry.principal import Scope
from tune.jobs.database import Database
from tune.jobs.schema import keys


class KeyStore:
    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def all(self) -> list[KeyRecord]:
        """Every key that ever was, oldest first."""
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(select(keys).order_by(keys.c.created_at, keys.c.id))]

    def create(self, new: NewKey) -> Secret:
        """Enter a new key. What is returned is the only copy of its secret.

        Raises:
            InvalidRequestError: it would be good for nothing, or is over already.
        """
        check_name(new.tenant)
        for model in new.models or ():
            _check_model(model)
        now = int(self._clock())
        if not new.scopes:
            raise errors.InvalidRequestError(f"A key needs a scope; there are {', '.join(Scope)}.", param="scope")
        if new.expires_at is not None and new.expires_at <= now:
            raise errors.InvalidRequestError("A key must expire in the future.", param="expires")
        secret = new_secret()
        limits = new.limits
        with self._database.write() as connection:
            connection.execute(
                insert(keys).values(
                    id=secret.key_id,
                    tenant=new.tenant,
                    scopes=sorted(new.scopes),
                    models=None if new.models is None else sorted(new.models),
                    requests_per_minute=limits.requests_per_minute,
                    tokens_per_minute=limits.tokens_per_minute,
                    concurrency=limits.concurrency,
                    digest=secret.digest,
                    created_at=now,
                    expires_at=new.expires_at,
                )
            )
        return secret

    def revoke(self, key_id: str) -> None:
        """End the key for good. Repeating it is fine.

        Raises:
            NotFoundError: there is no such key.
        """
        with self._database.write() as connection:
            self._require(connection.execute(select(keys).where(keys.c.id == key_id)).one_or_none(), key_id)
            connection.execute(
                update(keys)
                .where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
                .values(revoked_at=int(self._clock()))
            )

    def rotate(self, key_id: str, *, grace_seconds: int) -> Secret:
        """Give the key a new secret; the present one is good for ``grace_seconds`` more.

        Raises:
            NotFoundError: there is no such key.
            ConflictError: it is revoked or has expired; or an earlier secret is still good, which would end before the
                time that was promised, and ``grace_seconds`` does not say that all of them shall.
        """
        now = int(self._clock())
        with self._database.write() as connection:
            row = connection.execute(select(keys).where(keys.c.id == key_id).with_for_update()).one_or_none()
            record = self._require(row, key_id)
            if (reason := record.refusal(now)) is not None:
                raise errors.ConflictError(f"The key {key_id} {reason}; create another one.", code="key_not_valid")
            if grace_seconds and len(record.digests(now)) > 1:
                raise errors.ConflictError(
                    f"The key {key_id} was rotated, and the secret from before is good for "
                    f"{(record.previous_until or now) - now} seconds yet; another rotation would end it. Wait, or "
                    "rotate with --grace 0s, which ends every secret but the new one.",
                    code="key_rotating",
                )
            secret = new_secret(key_id)
            connection.execute(
                update(keys)
                .where(keys.c.id == key_id)
                .values(digest=secret.digest, previous_digest=record.digest, previous_until=now + grace_seconds)
            )
        return secret

    def _require(self, row: Row[Any] | None, key_id: str) -> KeyRecord:
        if row is None:
            raise errors.NotFoundError(f"There is no key {key_id[:40]!r}; `capo keys list` shows which there are.")
        return _record(row)


def _check_model(name: str) -> None:
    """Raises :class:`InvalidNameError` for what names neither a base model nor one of a registry."""
    try:
        parse_reference(name)
    except errors.InvalidNameError as error:
        try:
            check_base_model_id(name)
        except errors.InvalidNameError:
            raise error from None


def _record(row: Row[Any]) -> KeyRecord:
    return KeyRecord(
        id=row.id,
        tenant=row.tenant,
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        models=None if row.models is None else frozenset(row.models),
        limits=KeyLimits(row.requests_per_minute, row.tokens_per_minute, row.concurrency),
        digest=row.digest,
        previous_digest=row.previous_digest,
        previous_until=row.previous_until,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
