"""Jobs count how often a worker took them, forgiven attempts too, and know since when they wait."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("claims", sa.BigInteger, nullable=False, server_default="0"))
    op.execute("UPDATE jobs SET claims = attempts")
    op.add_column("jobs", sa.Column("queued_at", sa.Float))
