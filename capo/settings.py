"""The one settings record of a Capo process.

Order: command line, then environment (``CAPO_*``), then the defaults here. Each default stands once, with its reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from capo.roles import Role
from registry import errors, parse_reference
from registry.names import check_name
from serve.limits import Limits
from tune.jobs.database_url import sqlite_url

DEFAULT_DATA_DIR = Path("capo-data")
_LIMITS = Limits()


class Settings(BaseSettings):
    """What a serving process needs to know. Frozen: a running process never changes its settings."""

    model_config = SettingsConfigDict(env_prefix="CAPO_", frozen=True, extra="forbid")

    role: Role = Field(
        default=Role.ALL,
        description="all: one process serves and takes jobs. infer: a replica with an engine and no jobs. control: "
        "files, jobs, models and aliases, and no engine.",
    )
    model: str = Field(
        default="capo-tiny",
        description="Base model: capo-tiny (embedded), a directory, name@revision of a merged or GPTQ artifact, or a "
        "Hugging Face id. The embedded one needs neither network nor GPU.",
    )
    data_dir: Path = Field(
        default=DEFAULT_DATA_DIR,
        description="Everything Capo writes: registry, uploaded files, job store, work dirs.",
    )
    database_url: str | None = Field(
        default=None,
        description="The job store, as postgresql+psycopg://user:password@host/database for workers on other machines "
        "that share DATA_DIR; not set: a SQLite file in DATA_DIR, which needs all processes on one machine.",
    )
    registry_dir: Path | None = Field(default=None, description="The registry; not set: DATA_DIR/registry.")
    host: str = Field(default="127.0.0.1", description="Loopback by default: there are no keys yet to guard a network.")
    port: int = Field(default=8000, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    grpc_port: int = Field(default=50051, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    workers: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Local training workers; not set: 1 with role all, else 0, because `capo worker` runs elsewhere.",
    )
    worker_threads: int | None = Field(
        default=None,
        ge=1,
        description="OpenMP threads of a training job; not set: one less than there are cores.",
    )
    engine_threads: int | None = Field(
        default=None,
        ge=1,
        description="OpenMP threads of a CPU engine; not set: one less than there are cores.",
    )
    organization: str = Field(default="capo", description="The organisation in ft:<base>:<organization>:<suffix>:<id>.")
    drain_seconds: float = Field(
        default=20.0,
        ge=0,
        description="How long SIGTERM waits for running requests; with closing, below Kubernetes' grace of 30 s.",
    )
    adapter_wait_seconds: float = Field(
        default=30.0, gt=0, description="How long a request waits for an adapter slot before 503."
    )
    max_in_flight: int = Field(default=_LIMITS.max_in_flight, ge=1, description="Requests at once; beyond it 503.")
    max_in_flight_per_model: int = Field(
        default=_LIMITS.max_in_flight_per_model, ge=1, description="The same for one revision or the base; then 429."
    )
    engine_stall_seconds: float = Field(
        default=_LIMITS.engine_stall_seconds, gt=0, description="Without a finished step the engine counts as hanging."
    )
    alias_warm_seconds: float = Field(
        default=_LIMITS.alias_warm_seconds,
        gt=0,
        description="How long setting an alias or a pin waits for its adapters to load.",
    )
    pin: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Adapters that stay in the engine: aliases, ft: names or revisions, with commas between them. Each "
        "takes one of the engine's slots for good, and one slot is left for the others.",
    )
    import_dir: Path | None = Field(
        default=None,
        description="Directory from which /v1/load_lora_adapter may import adapters; not set: it is refused, because "
        "there are no keys yet to say who may.",
    )
    max_metric_adapters: int = Field(
        default=100, ge=1, description="Adapters with metric series of their own; the rest share 'other'."
    )
    log_level: str = Field(default="info", description="debug, info, warning or error.")

    @field_validator("pin", mode="before")
    @classmethod
    def _pins_are_references(cls, value: object) -> object:
        references = value.split(",") if isinstance(value, str) else value
        if not isinstance(references, (list, tuple)):
            return value
        stripped = [str(reference).strip() for reference in references]
        for reference in filter(None, stripped):
            try:
                parse_reference(reference)
            except errors.InvalidNameError as error:
                raise ValueError(error.message) from error
        return tuple(filter(None, stripped))

    @field_validator("organization")
    @classmethod
    def _organization_is_a_name(cls, value: str) -> str:
        try:
            return check_name(value)
        except errors.InvalidNameError as error:
            raise ValueError(error.message) from error

    @model_validator(mode="after")
    def _replicas_train_nothing(self) -> Self:
        if self.role is Role.INFER and self.workers:
            raise ValueError(f"workers={self.workers} needs jobs, and role=infer has none; use role all or control")
        return self

    @property
    def num_workers(self) -> int:
        if self.workers is not None:
            return self.workers
        return 1 if self.role is Role.ALL else 0

    @property
    def registry_path(self) -> Path:
        return self.registry_dir if self.registry_dir is not None else self.data_dir / "registry"

    @property
    def job_store_url(self) -> str:
        if self.database_url is not None:
            return self.database_url
        return sqlite_url((self.data_dir / "jobs.sqlite").absolute())
