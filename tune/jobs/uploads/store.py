"""The rows of uploads and their parts. Every method is one transaction, blocks, and may be called from many threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from sqlalchemy import Connection, delete, func, insert, select, update

from registry.errors import ConflictError, InvalidRequestError, NotFoundError, RateLimitedError
from registry.names import shown
from tune.jobs.database import Database
from tune.jobs.idempotency import Idempotency, find_made, make_once
from tune.jobs.limits import MAX_PART_BYTES, MAX_UPLOAD_BYTES
from tune.jobs.records import FileRecord
from tune.jobs.rows import new_id, owned
from tune.jobs.schema import files, upload_parts, uploads
from tune.jobs.uploads.records import PartRecord, UploadRecord

LIFE_SECONDS = 3600
"""OpenAI's: an upload expires an hour after it was created (openai/resources/uploads/uploads.py)."""
MAX_PARTS = 10_000
MAX_PENDING = 100
"""Uploads of one tenant at a time."""
PENDING_UPLOADS_OF_FULL_SIZE = 4
"""What a tenant's pending uploads may announce together, in uploads of the largest size: it lies on the disk twice
while one of them is completed."""
_SURPLUS_PARTS = 8
"""A client that saw no answer sends a part again; what it sends may pass what it announced by this many parts."""


class UploadStore:
    """Uploads of ``tenant``, or everybody's, for tidying up."""

    def __init__(
        self,
        database: Database,
        *,
        max_part_bytes: int = MAX_PART_BYTES,
        max_upload_bytes: int = MAX_UPLOAD_BYTES,
        tenant: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._max_part_bytes = max_part_bytes
        self._max_upload_bytes = max_upload_bytes
        self._tenant = tenant
        self._clock = clock

    def seen_by(self, tenant: str) -> UploadStore:
        """The same store as one tenant sees it."""
        return UploadStore(
            self._database,
            max_part_bytes=self._max_part_bytes,
            max_upload_bytes=self._max_upload_bytes,
            tenant=tenant,
            clock=self._clock,
        )

    @property
    def tenant(self) -> str:
        assert self._tenant is not None, "this is everybody's view of the uploads, and whose is this one?"
        return self._tenant

    def create(
        self,
        *,
        filename: str,
        purpose: str,
        size_bytes: int,
        file_expires_after_seconds: int | None,
        asked: Idempotency | None = None,
    ) -> UploadRecord:
        """A new pending upload; or the one that ``asked`` made before.

        Raises:
            RateLimitedError: the tenant has too many pending ones, or too large ones.
            ConflictError: the key of ``asked`` made something else.
        """
        now = int(self._clock())

        def enter(connection: Connection) -> str:
            pending = select(func.count(), func.coalesce(func.sum(uploads.c.size_bytes), 0)).where(
                uploads.c.tenant == self.tenant, uploads.c.status == "pending", uploads.c.expires_at > now
            )
            number, announced = connection.execute(pending).one()
            most_bytes = PENDING_UPLOADS_OF_FULL_SIZE * self._max_upload_bytes
            if number >= MAX_PENDING or announced + size_bytes > most_bytes:
                raise RateLimitedError(
                    f"{number} uploads of {announced} bytes are pending, and at a time there are at most {MAX_PENDING} "
                    f"of {most_bytes} bytes; complete or cancel some of them",
                    code="too_many_uploads",
                    retry_after_seconds=60.0,
                )
            record = UploadRecord(
                id=new_id("upload_"),
                tenant=self.tenant,
                filename=filename,
                purpose=purpose,
                size_bytes=size_bytes,
                file_expires_after_seconds=file_expires_after_seconds,
                status="pending",
                part_ids=None,
                file_id=None,
                created_at=now,
                expires_at=now + LIFE_SECONDS,
            )
            connection.execute(insert(uploads).values(**asdict(record)))
            return record.id

        return self.get(make_once(self._database, asked, enter, tenant=self.tenant, now=now))

    def get(self, upload_id: str) -> UploadRecord:
        """Raises :class:`NotFoundError`."""
        with self._database.read() as connection:
            return self._load(connection, upload_id)

    def pending(self, upload_id: str) -> UploadRecord:
        """An upload that can still be added to. Raises :class:`NotFoundError`, :class:`ConflictError`."""
        return _require_pending(self.get(upload_id))

    def part_sizes(self, upload_id: str) -> dict[str, int]:
        query = select(upload_parts.c.id, upload_parts.c.size_bytes).where(upload_parts.c.upload_id == upload_id)
        with self._database.read() as connection:
            return {row.id: row.size_bytes for row in connection.execute(query)}

    def made_part(self, asked: Idempotency) -> PartRecord | None:
        """The part that this request made before. Raises :class:`ConflictError` if its key made something else."""
        with self._database.read() as connection:
            made = find_made(connection, asked, tenant=self.tenant, now=self._clock())
            return None if made is None else _load_part(connection, made)

    def add_part(self, upload_id: str, part_id: str, size_bytes: int, asked: Idempotency | None) -> PartRecord:
        """Enter a part whose bytes are in place; or return the one that ``asked`` made before.

        Raises:
            ConflictError: the upload has ended meanwhile.
            InvalidRequestError: its parts are more, or larger, than it can need.
        """
        now = int(self._clock())

        def enter(connection: Connection) -> str:
            # The lock keeps the upload from being completed or cancelled under this transaction.
            record = _require_pending(self._load(connection, upload_id, lock=True))
            sums = select(func.count(), func.coalesce(func.sum(upload_parts.c.size_bytes), 0))
            number, received = connection.execute(sums.where(upload_parts.c.upload_id == upload_id)).one()
            allowed = record.size_bytes + _SURPLUS_PARTS * min(self._max_part_bytes, record.size_bytes)
            if number >= MAX_PARTS or received + size_bytes > allowed:
                raise InvalidRequestError(
                    f"{upload_id} has {number} parts of {received} bytes for a file of {record.size_bytes} bytes, and "
                    f"this part is too much: at most {MAX_PARTS} parts and {allowed} bytes are taken",
                    code="too_many_parts",
                    param="data",
                )
            part = PartRecord(part_id, upload_id, size_bytes, now)
            connection.execute(insert(upload_parts).values(**asdict(part)))
            return part_id

        made = make_once(self._database, asked, enter, tenant=self.tenant, now=now)
        with self._database.read() as connection:
            return _load_part(connection, made)

    def complete(self, upload_id: str, part_ids: Sequence[str], file: FileRecord) -> UploadRecord:
        """Enter the file and end the upload, both or neither. Raises :class:`ConflictError` if it has ended."""
        with self._database.write() as connection:
            _require_pending(self._load(connection, upload_id, lock=True))
            connection.execute(insert(files).values(**asdict(file)))
            self._end(connection, upload_id, status="completed", part_ids=list(part_ids), file_id=file.id)
            return self._load(connection, upload_id)

    def cancel(self, upload_id: str) -> UploadRecord:
        """End a pending upload; repeating it is fine. Raises :class:`ConflictError` if it ended otherwise."""
        with self._database.write() as connection:
            record = self._load(connection, upload_id, lock=True)
            if record.status != "cancelled":
                _require_pending(record)
                self._end(connection, upload_id, status="cancelled")
            return self._load(connection, upload_id)

    def take_expired(self) -> list[str]:
        """Mark uploads whose time is over; the ids, whose parts are the caller's to remove."""
        query = update(uploads).where(uploads.c.status == "pending", uploads.c.expires_at <= self._clock())
        with self._database.write() as connection:
            ids = list(connection.execute(query.values(status="expired").returning(uploads.c.id)).scalars())
            connection.execute(delete(upload_parts).where(upload_parts.c.upload_id.in_(ids)))
        return ids

    def pending_ids(self) -> set[str]:
        with self._database.read() as connection:
            return set(connection.execute(select(uploads.c.id).where(uploads.c.status == "pending")).scalars())

    def _end(self, connection: Connection, upload_id: str, **values: object) -> None:
        connection.execute(update(uploads).where(uploads.c.id == upload_id).values(**values))
        connection.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload_id))

    def _load(self, connection: Connection, upload_id: str, *, lock: bool = False) -> UploadRecord:
        query = select(uploads).where(uploads.c.id == upload_id, owned(uploads, self._tenant))
        row = connection.execute(query.with_for_update() if lock else query).one_or_none()
        if row is None:
            raise NotFoundError(f"there is no upload {shown(upload_id)}")
        record = UploadRecord(**{name: getattr(row, name) for name in UploadRecord.__dataclass_fields__})
        if record.status == "pending" and record.expires_at <= self._clock():
            return replace(record, status="expired")
        return record


def _require_pending(record: UploadRecord) -> UploadRecord:
    if record.status != "pending":
        raise ConflictError(
            f"{record.id} is {record.status}; only a pending upload takes parts, and can be completed or cancelled",
            code="upload_not_pending",
        )
    return record


def _load_part(connection: Connection, part_id: str) -> PartRecord:
    row = connection.execute(select(upload_parts).where(upload_parts.c.id == part_id)).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no part {shown(part_id)}: its upload has ended")
    return PartRecord(**row._mapping)
