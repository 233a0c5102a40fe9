"""The one settings record of a Capo process.

Order: command line, then environment (``CAPO_*``), then files of the directory that ``CAPO_SECRETS_DIR`` names (each
called like its variable), then the defaults here. Each default stands once, with its reason.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from capo.audit import AuditPlace
from capo.log_format import LogFormat, LogLevel
from capo.roles import LauncherKind, Role
from registry import errors, parse_reference
from registry.names import check_name
from serve import faces
from serve.adapter_labels import MAX_LABELLED_ADAPTERS
from serve.constraints import SLOWEST_TRIAL_SECONDS
from serve.limits import ADAPTER_WAIT_SECONDS, Limits
from tune.jobs.database_url import sqlite_url
from tune.jobs.limits import MAX_FILE_BYTES, MAX_FILE_ROWS, MAX_GPUS
from tune.jobs.settings import STOP_GRACE_SECONDS

DEFAULT_DATA_DIR = Path("capo-data")
_LIMITS = Limits()


class Settings(BaseSettings):
    """What a serving process needs to know. Frozen: a running process never changes its settings."""

    model_config = SettingsConfigDict(env_prefix="CAPO_", frozen=True, extra="forbid")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        directory = os.environ.get("CAPO_SECRETS_DIR")
        if not directory:
            return init_settings, env_settings
        if not Path(directory).is_dir():
            raise SettingsError(f"CAPO_SECRETS_DIR={directory} is no directory; name that with the files, or unset it")
        return init_settings, env_settings, SecretsSettingsSource(settings_cls, directory)

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
    host: str = Field(
        default="127.0.0.1",
        description="Loopback by default. Any other address needs a key in the store, or allow_unauthenticated.",
    )
    allow_unauthenticated: bool = Field(
        default=False,
        description="Listen beyond loopback although no key was made: where everybody in the network may do "
        "everything, or something in front of Capo asks for keys.",
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="/metrics on a port of its own and no longer on the HTTP port, which it is on if this is not set.",
    )
    health_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="/livez, /readyz and /startupz on a port of their own as well, which is plain text also where the "
        "others speak TLS: a kubelet has no certificate to show, and Docker's health check trusts none.",
    )
    tls_certificate: Path | None = Field(
        default=None, description="Certificate chain in PEM; with it HTTP and gRPC speak TLS only. Not set: plain text."
    )
    tls_key: Path | None = Field(default=None, description="The certificate's private key, in PEM.")
    tls_client_ca: Path | None = Field(
        default=None,
        description="Certificates in PEM; clients must show one that these signed (mTLS). Not set: they need none.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    grpc_port: int = Field(default=50051, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    workers: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Local training workers; not set: 1 with role all, else 0, because `capo worker` runs elsewhere.",
    )
    launcher: LauncherKind = Field(
        default=LauncherKind.LOCAL,
        description="How workers come to jobs. local: WORKERS processes here, kept warm. kubernetes, ray: one worker "
        "in the cluster for each job.",
    )
    max_launched_jobs: int = Field(
        default=8,
        ge=1,
        le=1000,
        description="Workers that the launchers kubernetes and ray have in the cluster at once.",
    )
    max_running_jobs_per_tenant: int | None = Field(
        default=None, ge=1, description="Jobs of one tenant that train at once; not set: as many as there are workers."
    )
    worker_gpus: int | None = Field(
        default=None,
        ge=0,
        le=MAX_GPUS,
        description="GPUs of a worker, its own; it leaves jobs alone that ask for more (capo.gpus). Not set: those it "
        "sees, divided among the workers here. 0: workers share all, and take no job that asks for any.",
    )
    kubernetes_image: str | None = Field(default=None, description="Image of launched workers; its entrypoint is capo.")
    kubernetes_volume_claim: str | None = Field(
        default=None, description="PersistentVolumeClaim with DATA_DIR, which launched workers share."
    )
    kubernetes_secret: str | None = Field(
        default=None, description="Secret that launched workers get as SECRETS_DIR, with the job store's URL."
    )
    kubernetes_cpu: str = Field(default="2", description="Cores of a launched worker, as Kubernetes writes them.")
    kubernetes_memory: str = Field(default="8Gi", description="Memory of a launched worker, likewise.")
    ray_address: str | None = Field(
        default=None, description="Ray's dashboard, http://host:8265; its nodes have capo on their PATH."
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
    worker_stop_seconds: float = Field(
        default=STOP_GRACE_SECONDS,
        gt=0,
        description="How long a pause, or SIGTERM to a worker, waits for the training to stop at its next step with a "
        "checkpoint; one that is killed goes on from an older checkpoint. With what follows, below the 60 s that "
        "Kubernetes gives a worker. A cancel does not wait for this long.",
    )
    organization: str = Field(
        default="capo",
        description="The service's own tenant, in ft:<base>:<organization>:<suffix>:<id>. Without keys everything is "
        "its; with keys, its own may also change models that belong to no tenant.",
    )
    drain_seconds: float = Field(
        default=20.0,
        ge=0,
        description="How long SIGTERM waits for running requests; with closing, below Kubernetes' grace of 30 s.",
    )
    adapter_wait_seconds: float = Field(
        default=ADAPTER_WAIT_SECONDS, gt=0, description="How long a request waits for an adapter slot before 503."
    )
    max_in_flight: int = Field(
        default=_LIMITS.max_in_flight, ge=1, description="Requests at once, running and waiting ones; beyond it 503."
    )
    max_in_flight_per_model: int = Field(
        default=_LIMITS.max_in_flight_per_model,
        ge=1,
        description="The same for one revision or the base, running and waiting ones in one number; beyond it 429.",
    )
    engine_stall_seconds: float = Field(
        default=_LIMITS.engine_stall_seconds,
        gt=0,
        description="Without a finished step or load the engine counts as hanging.",
    )
    alias_warm_seconds: float = Field(
        default=_LIMITS.alias_warm_seconds,
        gt=0,
        description="How long setting an alias or a pin waits for its adapters to load.",
    )
    max_n: int = Field(default=_LIMITS.max_n, ge=1, le=_LIMITS.max_n, description="Answers to one prompt; then 400.")
    max_logprobs: int = Field(
        default=_LIMITS.max_logprobs, ge=0, le=_LIMITS.max_logprobs, description="Of each token; then 400."
    )
    max_stop_strings: int = Field(
        default=_LIMITS.max_stop_strings, ge=0, le=_LIMITS.max_stop_strings, description="In one request; then 400."
    )
    max_prompts: int = Field(
        default=_LIMITS.max_prompts, ge=1, le=_LIMITS.max_prompts, description="In one request; then 400."
    )
    max_messages: int = Field(
        default=_LIMITS.max_messages, ge=1, le=_LIMITS.max_messages, description="In one request; then 400."
    )
    max_constraint_bytes: int = Field(
        default=_LIMITS.max_constraint_bytes,
        ge=0,
        le=_LIMITS.max_constraint_bytes,
        description="Of the JSON of a schema, regex, grammar or list of choices; then 400.",
    )
    max_constraint_seconds: float = Field(
        default=SLOWEST_TRIAL_SECONDS,
        gt=0,
        le=SLOWEST_TRIAL_SECONDS,
        description="To check and compile one and try it out, beside the engine; then 400.",
    )
    max_head_bytes: int = Field(
        default=faces.MAX_HEAD_BYTES,
        ge=1024,
        le=faces.MAX_HEAD_BYTES,
        description="Of a request's line and headers, then 431, and of gRPC's metadata.",
    )
    max_body_bytes: int = Field(
        default=faces.MAX_REQUEST_BYTES,
        ge=1024,
        le=faces.MAX_REQUEST_BYTES,
        description="Of a JSON body or a gRPC message; then 413. Uploads have a limit of their own.",
    )
    stalled_reader_seconds: float = Field(
        default=faces.STALLED_READER_SECONDS,
        gt=0,
        le=faces.STALLED_READER_SECONDS,
        description="A client that takes nothing of its answer for this long is given up.",
    )
    max_file_bytes: int = Field(
        default=MAX_FILE_BYTES, ge=1024, le=MAX_FILE_BYTES, description="Of an uploaded file; then 413."
    )
    max_file_rows: int = Field(
        default=MAX_FILE_ROWS, ge=10, le=MAX_FILE_ROWS, description="Of a training file; then 413."
    )
    pin: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Adapters that stay in the engine: aliases, ft: names or revisions, with commas between them. Each "
        "takes one of the engine's slots for good, and one slot is left for the others.",
    )
    import_dir: Path | None = Field(
        default=None,
        description="Directory from which /v1/load_lora_adapter may import adapters, by whoever has the scope admin; "
        "not set: it is refused.",
    )
    audit_log: AuditPlace | None = Field(
        default=None,
        description="Where admin acts are written. file: DATA_DIR/audit.jsonl. stdout: standard output, for a log "
        "collector. Not set: stdout with role infer, whose DATA_DIR may go with it, else file.",
    )
    max_metric_adapters: int = Field(
        default=MAX_LABELLED_ADAPTERS,
        ge=1,
        description="Adapters with metric series of their own; the rest share 'other'. With 64 busy ones a page is "
        "1.2 MB, made in 0.1 s.",
    )
    log_level: LogLevel = Field(default=LogLevel.INFO, description="Of Capo's own lines.")
    log_format: LogFormat = Field(
        default=LogFormat.TEXT, description="text: lines for people. json: one object to a line, for a log collector."
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/\s@]+(/\S*)?$",
        description="OpenTelemetry collector that spans are sent to, http://host:4318; not set: nothing is recorded.",
    )

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
    def _tls_is_whole(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError(
                f"tls_certificate={self.tls_certificate} and tls_key={self.tls_key} belong together; give both"
            )
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError(f"tls_client_ca={self.tls_client_ca} needs tls_certificate and tls_key")
        return self

    @model_validator(mode="after")
    def _replicas_train_nothing(self) -> Self:
        if self.role is Role.INFER and self.workers:
            raise ValueError(f"workers={self.workers} needs jobs, and role=infer has none; use role all or control")
        return self

    @model_validator(mode="after")
    def _launcher_is_told_what_it_needs(self) -> Self:
        needed = {
            LauncherKind.LOCAL: (),
            LauncherKind.KUBERNETES: ("kubernetes_image", "kubernetes_volume_claim", "database_url"),
            LauncherKind.RAY: ("ray_address",),
        }[self.launcher]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"launcher={self.launcher} needs {name}, and it is not set (CAPO_{name.upper()})")
        if self.launcher is not LauncherKind.LOCAL and self.workers:
            raise ValueError(f"workers={self.workers} are local ones, and launcher={self.launcher}; leave workers out")
        return self

    @property
    def num_workers(self) -> int:
        if self.workers is not None:
            return self.workers
        return 1 if self.role is Role.ALL and self.launcher is LauncherKind.LOCAL else 0

    @property
    def audit_place(self) -> AuditPlace:
        if self.audit_log is not None:
            return self.audit_log
        return AuditPlace.STDOUT if self.role is Role.INFER else AuditPlace.FILE

    @property
    def registry_path(self) -> Path:
        return self.registry_dir if self.registry_dir is not None else self.data_dir / "registry"

    @property
    def job_store_url(self) -> str:
        if self.database_url is not None:
            return self.database_url
        return sqlite_url((self.data_dir / "jobs.sqlite").absolute())
