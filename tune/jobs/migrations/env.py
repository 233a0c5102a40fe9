"""What Alembic runs for each command: our connection, our transaction."""

from __future__ import annotations

from alembic import context

from tune.jobs import schema

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=schema.metadata, render_as_batch=True)
context.run_migrations()
