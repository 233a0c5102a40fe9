"""Files and jobs belong to a tenant. A job's organisation was that already; files are given to the service's own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # Both databases rename a column in place; Alembic would copy the whole table on SQLite.
    op.execute("ALTER TABLE jobs RENAME COLUMN organization_id TO tenant")
    # SQLite adds no NOT NULL column without a default; no tenant has this one.
    op.add_column("files", sa.Column("tenant", sa.Text, nullable=False, server_default=""))
    op.get_bind().execute(sa.text("UPDATE files SET tenant = :tenant"), {"tenant": context.config.attributes["tenant"]})
