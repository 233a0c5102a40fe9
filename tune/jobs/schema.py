"""Tables of the job store, in SQL that SQLite and PostgreSQL both take. Each change of them is also a migration.

Order never comes from a clock: rows carry a growing ``position`` (jobs, files) or ``sequence`` (events).
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

metadata = MetaData()

# SQLite grows a key by itself only when its type is exactly INTEGER.
_position = BigInteger().with_variant(Integer, "sqlite")

files = Table(
    "files",
    metadata,
    Column("position", _position, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", Text, nullable=False, server_default=""),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("rows", BigInteger),
    Column("row_format", String(32)),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    # A deleted file keeps its row: jobs point to it, and a list's cursor may stand on it.
    Column("deleted_at", BigInteger),
)

jobs = Table(
    "jobs",
    metadata,
    Column("position", _position, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("status", String(32), nullable=False),
    Column("model", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("training_file", String(64), ForeignKey("files.id"), nullable=False),
    Column("validation_file", String(64), ForeignKey("files.id")),
    Column("suffix", String(64)),
    Column("seed", BigInteger, nullable=False),
    Column("hyperparameters", JSON, nullable=False),
    Column("metadata", JSON(none_as_null=True)),
    Column("extensions", JSON, nullable=False),
    Column("integrations", JSON(none_as_null=True)),
    Column("reserved_name", Text, nullable=False, unique=True),
    Column("fine_tuned_model", Text),
    Column("revision", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("estimated_finish", BigInteger),
    Column("trained_tokens", BigInteger),
    Column("result_files", JSON, nullable=False),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("error_param", Text),
    Column("owner", Text),
    Column("epoch", BigInteger, nullable=False, default=0),
    Column("heartbeats", BigInteger, nullable=False, default=0),
    Column("heartbeat_at", Float),
    Column("lease_seconds", Float, nullable=False, default=0.0),
    # Those that count towards the last one: a pause or a stopped worker takes its attempt back.
    Column("attempts", Integer, nullable=False, default=0),
    # All of them.
    Column("claims", BigInteger, nullable=False, default=0, server_default="0"),
    # Since when it waits for a worker, or last did. NULL in a job from before there was this column.
    Column("queued_at", Float),
    Column("not_before", Float, nullable=False, default=0.0),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("paused", Boolean, nullable=False, default=False, server_default=false()),
    Column("priority", Integer, nullable=False, default=0, server_default="0"),
    Column("method", String(16), nullable=False, default="supervised", server_default="supervised"),
    Column("gpus", Integer, nullable=False, default=0, server_default="0"),
    Column("last_event", BigInteger, nullable=False, default=0),
    Column("trace_headers", JSON(none_as_null=True)),
    Index("jobs_by_status", "status", "priority", "position"),
)

job_metadata = Table(
    "job_metadata",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(512), nullable=False),
    Index("job_metadata_by_pair", "key", "value"),
)

job_files = Table(
    "job_files",
    metadata,
    # Files that only the stages of the capo object name; training and validation file stand in the job itself.
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("file_id", String(64), ForeignKey("files.id"), primary_key=True),
    Index("job_files_by_file", "file_id"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("made_id", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("position", _position, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("file_expires_after_seconds", BigInteger),
    Column("status", String(16), nullable=False),
    Column("part_ids", JSON(none_as_null=True)),
    Column("file_id", String(64), ForeignKey("files.id")),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Index("uploads_by_status", "status", "expires_at"),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("upload_id", String(64), ForeignKey("uploads.id"), nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

checkpoint_permissions = Table(
    "checkpoint_permissions",
    metadata,
    Column("position", _position, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("model", Text, nullable=False),
    Column("project_id", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("model", "project_id", name="checkpoint_permissions_once"),
)

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("position", _position, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("event_types", JSON, nullable=False),
    # To sign with, so it cannot be kept as a hash.
    Column("secret", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("endpoint_id", String(64), ForeignKey("webhook_endpoints.id"), nullable=False, index=True),
    Column("payload", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("last_error", Text),
    Column("created_at", BigInteger, nullable=False),
    Index("webhook_deliveries_by_status", "status", "due_at"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("id", String(64), nullable=False, unique=True),
    Column("level", String(8), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON(none_as_null=True)),
    Column("created_at", BigInteger, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("models", JSON(none_as_null=True)),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrency", BigInteger),
    # Of the whole key; the key itself is nowhere.
    Column("digest", String(64), nullable=False),
    Column("previous_digest", String(64)),
    Column("previous_until", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
)
