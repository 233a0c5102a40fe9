"""Rows to records and back, inside a transaction that the caller has opened."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, exists, insert, or_, select, true, update

from registry.errors import InvalidRequestError, NotFoundError
from registry.names import shown
from tune.jobs.records import OPEN, EventRecord, FileRecord, Hyperparameters, JobError, JobRecord, NewEvent
from tune.jobs.schema import events, files, job_files, jobs

_ALPHABET = string.ascii_lowercase + string.digits


def new_id(prefix: str, length: int = 24) -> str:
    """``prefix`` and random lower-case letters and digits: 24 of them are 124 bits."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))


def load_job(connection: Connection, job_id: str, *, tenant: str | None = None) -> JobRecord:
    """The job's row. ``tenant``: nobody else's is there. Raises :class:`NotFoundError`."""
    row = connection.execute(select(jobs).where(jobs.c.id == job_id, owned(jobs, tenant))).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no fine-tuning job {shown(job_id)}; GET /v1/fine_tuning/jobs lists them")
    return job_record(row)


def owned(table: Table, tenant: str | None) -> ColumnElement[bool]:
    """Of rows of ``jobs`` or ``files``: those of one tenant; ``None``: all."""
    return true() if tenant is None else table.c.tenant == tenant


def append_events(connection: Connection, job_id: str, new: Sequence[NewEvent], *, now: int) -> None:
    """Add events in order, inside the caller's write transaction.

    The job's row hands out the numbers, so two writers of one job queue up on it.
    """
    last = connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(last_event=jobs.c.last_event + len(new))
        .returning(jobs.c.last_event)
    ).scalar_one()
    first = last - len(new) + 1
    rows: list[dict[str, Any]] = [
        {
            "job_id": job_id,
            "sequence": first + offset,
            "id": new_id("ftevent-"),
            "level": event.level,
            "kind": event.kind,
            "message": event.message,
            "data": None if event.data is None else dict(event.data),
            "created_at": now,
        }
        for offset, event in enumerate(new)
    ]
    if rows:
        connection.execute(insert(events), rows)


def is_live(now: float) -> ColumnElement[bool]:
    """Of rows of ``files``: not deleted, and not expired, unless an open job needs the file."""
    needed = exists().where(jobs.c.status.in_(OPEN), uses_file(files.c.id))
    return and_(files.c.deleted_at.is_(None), or_(files.c.expires_at.is_(None), files.c.expires_at > now, needed))


def uses_file(file_id: ColumnElement[str] | str) -> ColumnElement[bool]:
    """Of rows of ``jobs``: whether the job reads this file."""
    named = exists().where(job_files.c.job_id == jobs.c.id, job_files.c.file_id == file_id)
    return or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id, named)


def live_file(
    connection: Connection, file_id: str, *, now: float, tenant: str | None = None, lock: bool = False
) -> FileRecord:
    """A file that is there; ``lock`` keeps it so until the transaction ends. Raises :class:`NotFoundError`."""
    query = select(files).where(files.c.id == file_id, is_live(now), owned(files, tenant))
    # SQLite's writers exclude each other anyway and its dialect leaves FOR UPDATE out.
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no file {shown(file_id)}; GET /v1/files lists them")
    return file_record(row)


def position_of(connection: Connection, table: Table, after: str, *, tenant: str | None = None) -> int:
    """Where in ``table`` a list's cursor stands. Raises :class:`InvalidRequestError`."""
    query = select(table.c.position).where(table.c.id == after, owned(table, tenant))
    position = connection.execute(query).scalar_one_or_none()
    if position is None:
        raise unknown_cursor(after)
    return int(position)


def unknown_cursor(after: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"after={shown(after)} is not the id of an item of this list; give the last id of the previous page",
        code="invalid_cursor",
        param="after",
    )


def file_record(row: Row[Any]) -> FileRecord:
    values = dict(row._mapping)
    return FileRecord(**{name: values[name] for name in FileRecord.__dataclass_fields__})


def event_record(row: Row[Any]) -> EventRecord:
    return EventRecord(**row._mapping)


def job_record(row: Row[Any]) -> JobRecord:
    values = dict(row._mapping)
    code, message = values["error_code"], values["error_message"]
    values["error"] = None if code is None else JobError(code, message, values["error_param"])
    values["hyperparameters"] = Hyperparameters(**values["hyperparameters"])
    values["integrations"] = values["integrations"] or ()
    return JobRecord(**{name: values[name] for name in JobRecord.__dataclass_fields__})
