"""What is to be sent, kept in the job store until it was received or given up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection, delete, insert, or_, select, update

from tune.jobs.database import Database
from tune.jobs.rows import new_id
from tune.jobs.schema import webhook_deliveries, webhook_endpoints

RETRIED_SECONDS = 72 * 3600
"""As long as OpenAI tries (platform guide "Webhooks")."""
FIRST_PAUSE_SECONDS = 5.0
PAUSE_FACTOR = 4.0
LONGEST_PAUSE_SECONDS = 6 * 3600.0
_KEPT_SECONDS = 7 * 24 * 3600
"""A delivery that is over, for people who look into the store."""
_MAX_ERROR = 500


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message to one endpoint, taken to be sent now."""

    id: str
    """The ``webhook-id``, the same at each attempt."""
    endpoint_id: str
    url: str
    secret: str = field(repr=False)
    payload: str
    attempts: int
    """This attempt included."""
    created_at: int


def announce(connection: Connection, *, job_id: str, tenant: str, status: str, now: int) -> None:
    """Write a message to each of the tenant's endpoints that asked for this end, in the caller's transaction."""
    kind = f"fine_tuning.job.{status}"
    endpoints = select(webhook_endpoints.c.id, webhook_endpoints.c.event_types).where(
        webhook_endpoints.c.tenant == tenant
    )
    for endpoint in connection.execute(endpoints).all():
        if kind not in endpoint.event_types:
            continue
        event = {"id": new_id("evt_"), "object": "event", "created_at": now, "type": kind, "data": {"id": job_id}}
        connection.execute(
            insert(webhook_deliveries).values(
                id=new_id("wh_"),
                endpoint_id=endpoint.id,
                payload=json.dumps(event),
                status="waiting",
                attempts=0,
                due_at=0.0,
                created_at=now,
            )
        )


def pause_after(attempts: int) -> float:
    """Seconds until the next attempt: 5, 20, 80 … up to six hours."""
    return min(FIRST_PAUSE_SECONDS * PAUSE_FACTOR ** min(attempts - 1, 20), LONGEST_PAUSE_SECONDS)


class Outbox:
    """The sender's view. Each method is one transaction and blocks."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def take_due(self, busy: Mapping[str, int], *, per_endpoint: int, for_seconds: float) -> list[Delivery]:
        """What is due, the oldest first, at most ``per_endpoint`` for each endpoint, those on their way (``busy``)
        included.

        Nobody else gets it for ``for_seconds``; a sender that dies leaves it due again.
        """
        now = self._clock()
        table = webhook_deliveries
        is_due = (
            table.c.status == "waiting",
            # The clock was set back: nothing waits for longer than this, so do not wait for it.
            or_(table.c.due_at <= now, table.c.due_at > now + LONGEST_PAUSE_SECONDS),
        )
        full = [endpoint_id for endpoint_id, number in busy.items() if number >= per_endpoint]
        waiting = select(table.c.endpoint_id).where(*is_due, table.c.endpoint_id.not_in(full)).distinct()
        with self._database.read() as connection:  # most looks find nothing, and need no writer's lock
            endpoint_ids = list(connection.execute(waiting).scalars())
        if not endpoint_ids:
            return []
        taken: list[Delivery] = []
        with self._database.write() as connection:
            for endpoint_id in endpoint_ids:
                due = (
                    select(table, webhook_endpoints.c.url, webhook_endpoints.c.secret)
                    .join(webhook_endpoints, webhook_endpoints.c.id == table.c.endpoint_id)
                    .where(*is_due, table.c.endpoint_id == endpoint_id)
                    .order_by(table.c.due_at, table.c.created_at)
                    .limit(per_endpoint - busy.get(endpoint_id, 0))
                    .with_for_update(of=table, skip_locked=True)
                )
                taken += [
                    Delivery(
                        row.id, row.endpoint_id, row.url, row.secret, row.payload, row.attempts + 1, row.created_at
                    )
                    for row in connection.execute(due)
                ]
            connection.execute(
                update(table)
                .where(table.c.id.in_([delivery.id for delivery in taken]))
                .values(attempts=table.c.attempts + 1, due_at=now + for_seconds)
            )
        return taken

    def delivered(self, delivery: Delivery) -> None:
        now = self._clock()
        table = webhook_deliveries
        with self._database.write() as connection:
            connection.execute(update(table).where(table.c.id == delivery.id).values(status="delivered"))
            over = delete(table).where(table.c.status != "waiting", table.c.created_at < now - _KEPT_SECONDS)
            connection.execute(over)

    def failed(self, delivery: Delivery, reason: str) -> bool:
        """Put it back for later; or give it up after three days. Returns whether it will be tried again."""
        now = self._clock()
        due_at = now + pause_after(delivery.attempts)
        is_over = due_at > delivery.created_at + RETRIED_SECONDS
        values = {"status": "given_up" if is_over else "waiting", "due_at": due_at, "last_error": reason[:_MAX_ERROR]}
        with self._database.write() as connection:
            connection.execute(
                update(webhook_deliveries).where(webhook_deliveries.c.id == delivery.id).values(**values)
            )
        return not is_over
