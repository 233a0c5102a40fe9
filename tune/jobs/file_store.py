"""The rows of uploaded files. Their bytes are :mod:`tune.jobs.files`' business.

Every method is one transaction, blocks, and may be called from many threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Literal

from sqlalchemy import Connection, insert, select, update

from registry.errors import ConflictError
from tune.jobs.database import Database
from tune.jobs.idempotency import Idempotency, find_made, make_once
from tune.jobs.records import OPEN, FileRecord, Page
from tune.jobs.rows import file_record, is_live, live_file, owned, position_of, uses_file
from tune.jobs.schema import files, jobs

Order = Literal["asc", "desc"]


class FileStore:
    """Which files there are: those of ``tenant``, or everybody's, for workers and for tidying up."""

    def __init__(
        self, database: Database, *, tenant: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self.tenant = tenant
        self._clock = clock

    def seen_by(self, tenant: str) -> FileStore:
        """The same store as one tenant sees it: nobody else's files are there."""
        return FileStore(self._database, tenant=tenant, clock=self._clock)

    def add(self, record: FileRecord, asked: Idempotency | None = None) -> FileRecord:
        """Enter the file; or return the one that ``asked`` made before, if it is still there.

        Raises:
            ConflictError: the key of ``asked`` made something else.
        """

        def enter(connection: Connection) -> str:
            connection.execute(insert(files).values(**asdict(record)))
            return record.id

        made = make_once(self._database, asked, enter, tenant=record.tenant, now=self._clock(), is_there=self._is_there)
        return record if made == record.id else self.get(made)

    def made_by(self, asked: Idempotency) -> FileRecord | None:
        """The file that this request made before and that is still there.

        Raises:
            ConflictError: the key of ``asked`` made something else.
        """
        assert self.tenant is not None, "keys belong to a tenant"
        with self._database.read() as connection:
            made = find_made(connection, asked, tenant=self.tenant, now=self._clock())
            if made is None or not self._is_there(connection, made):
                return None
            return live_file(connection, made, now=self._clock(), tenant=self.tenant)

    def _is_there(self, connection: Connection, file_id: str) -> bool:
        query = select(files.c.id).where(files.c.id == file_id, is_live(self._clock()))
        return connection.execute(query).scalar_one_or_none() is not None

    def get(self, file_id: str) -> FileRecord:
        with self._database.read() as connection:
            return live_file(connection, file_id, now=self._clock(), tenant=self.tenant)

    def page(
        self, *, after: str | None, limit: int, order: Order = "desc", purpose: str | None = None
    ) -> Page[FileRecord]:
        query = select(files).where(is_live(self._clock()), owned(files, self.tenant))
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._database.read() as connection:
            if after is not None:
                position = position_of(connection, files, after, tenant=self.tenant)
                query = query.where(files.c.position > position if order == "asc" else files.c.position < position)
            query = query.order_by(files.c.position.asc() if order == "asc" else files.c.position.desc())
            rows = connection.execute(query.limit(limit + 1)).all()
        return Page([file_record(row) for row in rows[:limit]], len(rows) > limit)

    def delete(self, file_id: str) -> None:
        """Take the file out of every list. Its bytes are the caller's to remove.

        Raises:
            NotFoundError: there is no such file.
            ConflictError: a job that has not ended still needs it.
        """
        with self._database.write() as connection:
            live_file(connection, file_id, now=self._clock(), tenant=self.tenant, lock=True)
            user = connection.execute(
                select(jobs.c.id).where(jobs.c.status.in_(OPEN)).where(uses_file(file_id)).limit(1)
            ).scalar_one_or_none()
            if user is not None:
                raise ConflictError(
                    f"{file_id} is in use by {user}; wait until that job has ended, or cancel it",
                    code="file_in_use",
                )
            connection.execute(update(files).where(files.c.id == file_id).values(deleted_at=int(self._clock())))

    def take_expired(self) -> list[str]:
        """Mark everybody's files that have expired as deleted; their ids. Their bytes are the caller's to remove."""
        now = self._clock()
        query = update(files).where(files.c.deleted_at.is_(None), files.c.expires_at <= now, ~is_live(now))
        with self._database.write() as connection:
            return list(connection.execute(query.values(deleted_at=int(now)).returning(files.c.id)).scalars())

    def ids(self) -> set[str]:
        """Ids of all files that were not deleted, whosever they are."""
        with self._database.read() as connection:
            return set(connection.execute(select(files.c.id).where(files.c.deleted_at.is_(None))).scalars())
