"""Which tenants may use which fine-tuned models of others. OpenAI calls a tenant a project here.

Every method is one transaction, blocks, and may be called from many threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Row, delete, insert, select
from sqlalchemy.exc import IntegrityError

from registry.errors import NotFoundError
from registry.names import shown
from tune.jobs.database import Database
from tune.jobs.file_store import Order
from tune.jobs.records import Page
from tune.jobs.rows import new_id, unknown_cursor
from tune.jobs.schema import checkpoint_permissions


@dataclass(frozen=True, slots=True)
class PermissionRecord:
    id: str
    model: str
    """An ``ft:`` name, of a checkpoint or of a job's result."""
    project_id: str
    """The tenant that may use it."""
    created_at: int


class PermissionStore:
    """Permissions of every model. Whose a model is, the caller knows."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def is_shared_with(self, model: str, tenant: str) -> bool:
        """Whether the owner of ``model`` (an ``ft:`` name) lets ``tenant`` use it.

        To be asked before another tenant's model is called unknown: for inference, for ``GET /v1/models/{model}`` and
        for a job that goes on from it. It does not know who the owner is: an owner needs no permission, and a model
        without a tenant is everybody's. A permission is for exactly this name, so one of a job's result says nothing
        about the job's checkpoints; neither ends by itself when the model is deleted, but no other model ever gets
        the name. Blocks for one indexed query; call it from a thread.
        """
        query = select(checkpoint_permissions.c.id).where(
            checkpoint_permissions.c.model == model, checkpoint_permissions.c.project_id == tenant
        )
        with self._database.read() as connection:
            return connection.execute(query).first() is not None

    def shared_with(self, tenant: str) -> set[str]:
        """Every model that its owner lets ``tenant`` use, and those that were deleted since.

        Blocks for one query, which reads all permissions: there are few, for people make them.
        """
        query = select(checkpoint_permissions.c.model).where(checkpoint_permissions.c.project_id == tenant)
        with self._database.read() as connection:
            return set(connection.execute(query).scalars())

    def grant(self, model: str, project_ids: Sequence[str]) -> list[PermissionRecord]:
        """The permissions of these tenants, in their order; those that were there stay as they are."""
        try:
            return self._grant(model, project_ids)
        except IntegrityError:  # another request granted one of them at the same moment
            return self._grant(model, project_ids)

    def _grant(self, model: str, project_ids: Sequence[str]) -> list[PermissionRecord]:
        known = select(checkpoint_permissions).where(checkpoint_permissions.c.model == model)
        with self._database.write() as connection:
            present = {row.project_id for row in connection.execute(known)}
            for project_id in dict.fromkeys(project_ids):
                if project_id not in present:
                    connection.execute(
                        insert(checkpoint_permissions).values(
                            id=new_id("cp_"), model=model, project_id=project_id, created_at=int(self._clock())
                        )
                    )
            granted = {row.project_id: _record(row) for row in connection.execute(known)}
        return [granted[project_id] for project_id in dict.fromkeys(project_ids)]

    def page(
        self, model: str, *, after: str | None, limit: int, order: Order, project_id: str | None
    ) -> Page[PermissionRecord]:
        table = checkpoint_permissions
        query = select(table).where(table.c.model == model)
        if project_id is not None:
            query = query.where(table.c.project_id == project_id)
        with self._database.read() as connection:
            if after is not None:
                start = select(table.c.position).where(table.c.id == after, table.c.model == model)
                position = connection.execute(start).scalar_one_or_none()
                if position is None:
                    raise unknown_cursor(after)
                query = query.where(table.c.position > position if order == "asc" else table.c.position < position)
            query = query.order_by(table.c.position.asc() if order == "asc" else table.c.position.desc())
            rows = connection.execute(query.limit(limit + 1)).all()
        return Page([_record(row) for row in rows[:limit]], len(rows) > limit)

    def revoke(self, model: str, permission_id: str) -> None:
        """Raises :class:`NotFoundError` if the model has no such permission."""
        table = checkpoint_permissions
        with self._database.write() as connection:
            gone = connection.execute(delete(table).where(table.c.id == permission_id, table.c.model == model)).rowcount
        if not gone:
            raise NotFoundError(f"{shown(model)} has no permission {shown(permission_id)}; GET its permissions")


def _record(row: Row[tuple[object, ...]]) -> PermissionRecord:
    return PermissionRecord(**{name: getattr(row, name) for name in PermissionRecord.__dataclass_fields__})
