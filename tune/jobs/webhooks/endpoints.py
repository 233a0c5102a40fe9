"""Where webhooks go: the rows of endpoints. Every method is one transaction and blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from sqlalchemy import Connection, Row, delete, func, insert, select

from registry.errors import ConflictError, NotFoundError
from registry.names import shown
from tune.jobs.database import Database
from tune.jobs.idempotency import Idempotency, make_once
from tune.jobs.records import Page
from tune.jobs.rows import new_id, owned, position_of
from tune.jobs.schema import webhook_deliveries, webhook_endpoints
from tune.jobs.webhooks.signing import new_secret

EVENT_TYPES = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")
MAX_ENDPOINTS = 50
"""Of one tenant: every end of a job is sent to each."""


@dataclass(frozen=True, slots=True)
class EndpointRecord:
    id: str
    tenant: str
    name: str
    url: str
    event_types: Sequence[str]
    secret: str = field(repr=False)
    created_at: int


class EndpointStore:
    """Endpoints of ``tenant``."""

    def __init__(
        self, database: Database, *, tenant: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._tenant = tenant
        self._clock = clock

    def seen_by(self, tenant: str) -> EndpointStore:
        """The same store as one tenant sees it."""
        return EndpointStore(self._database, tenant=tenant, clock=self._clock)

    @property
    def tenant(self) -> str:
        assert self._tenant is not None, "whose endpoint is it?"
        return self._tenant

    def create(
        self, *, name: str, url: str, event_types: Sequence[str], asked: Idempotency | None = None
    ) -> EndpointRecord:
        """A new endpoint with a new secret; or the one that ``asked`` made before, with its secret.

        Raises:
            ConflictError: the tenant has as many as there may be, or the key of ``asked`` made something else.
        """
        now = int(self._clock())
        record = EndpointRecord(
            id=new_id("we_"),
            tenant=self.tenant,
            name=name,
            url=url,
            event_types=list(dict.fromkeys(event_types)),
            secret=new_secret(),
            created_at=now,
        )

        def enter(connection: Connection) -> str:
            number = select(func.count()).where(webhook_endpoints.c.tenant == self.tenant)
            if connection.execute(number).scalar_one() >= MAX_ENDPOINTS:
                raise ConflictError(
                    f"there are {MAX_ENDPOINTS} webhook endpoints, the most there may be; delete one of them",
                    code="too_many_endpoints",
                )
            connection.execute(insert(webhook_endpoints).values(**asdict(record)))
            return record.id

        return self.get(make_once(self._database, asked, enter, tenant=self.tenant, now=now))

    def get(self, endpoint_id: str) -> EndpointRecord:
        query = select(webhook_endpoints).where(
            webhook_endpoints.c.id == endpoint_id, owned(webhook_endpoints, self._tenant)
        )
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise _not_found(endpoint_id)
        return _record(row)

    def page(self, *, after: str | None, limit: int) -> Page[EndpointRecord]:
        """Newest first."""
        table = webhook_endpoints
        query = select(table).where(owned(table, self._tenant)).order_by(table.c.position.desc())
        with self._database.read() as connection:
            if after is not None:
                query = query.where(table.c.position < position_of(connection, table, after, tenant=self._tenant))
            rows = connection.execute(query.limit(limit + 1)).all()
        return Page([_record(row) for row in rows[:limit]], len(rows) > limit)

    def delete(self, endpoint_id: str) -> None:
        """What waits to be sent to it goes too. Raises :class:`NotFoundError`."""
        with self._database.write() as connection:
            own = select(webhook_endpoints.c.id).where(
                webhook_endpoints.c.id == endpoint_id, owned(webhook_endpoints, self._tenant)
            )
            if connection.execute(own.with_for_update()).one_or_none() is None:
                raise _not_found(endpoint_id)
            connection.execute(delete(webhook_deliveries).where(webhook_deliveries.c.endpoint_id == endpoint_id))
            connection.execute(delete(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id))


def _record(row: Row[tuple[object, ...]]) -> EndpointRecord:
    return EndpointRecord(**{name: getattr(row, name) for name in EndpointRecord.__dataclass_fields__})


def _not_found(endpoint_id: str) -> NotFoundError:
    return NotFoundError(f"there is no webhook endpoint {shown(endpoint_id)}; GET /v1/webhook_endpoints lists them")
