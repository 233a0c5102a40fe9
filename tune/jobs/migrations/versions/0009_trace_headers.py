"""Jobs carry the trace of the request that made them to their worker."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("trace_headers", sa.JSON(none_as_null=True)))
