"""Jobs can be paused, have a priority and a method; files say the format of their rows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("DROP TABLE IF EXISTS schema_info")
    op.add_column("jobs", sa.Column("method", sa.String(16), nullable=False, server_default="supervised"))
    op.add_column("jobs", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("paused", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("files", sa.Column("row_format", sa.String(32)))
    op.execute("UPDATE files SET row_format = 'chat' WHERE purpose = 'fine-tune'")
    op.drop_index("jobs_by_status", "jobs")
    op.create_index("jobs_by_status", "jobs", ["status", "priority", "position"])
