"""Jobs say how many GPUs they need."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("gpus", sa.Integer, nullable=False, server_default="0"))
