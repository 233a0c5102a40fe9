"""``manifest.json``: what an artifact is, what it was made from, and the digests of all its files.

The manifest is written last and names every other file with size and sha256, so the sha256 of the manifest's
own bytes vouches for the whole directory. That is the artifact's digest (the same idea as OCI's image
manifest). The bytes are canonical JSON (sorted keys, no spaces, ASCII, no NaN), but nobody has to serialise
again to check a digest: it is taken over the stored bytes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from registry.errors import InvalidArtifactError
from registry.files import check_relative_path
from registry.names import check_name
from registry.strict_json import parse_strict_json

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 32 << 20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
"""Up to what every reader of JSON takes exactly (RFC 8259, section 6), and int64 on the wire holds it."""
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """What all stored records share: they do not change, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Record):
    size_bytes: Count
    sha256: Sha256


class BaseModelIdentity(Record):
    """Which base model an artifact belongs to. None means: not known (an adapter imported without its base)."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    fingerprint: Sha256 | None = None
    """Over configuration, tokenizer and sampled weights; see :mod:`registry.base_model`."""
    config_digest: Sha256 | None = None
    tokenizer_digest: Sha256 | None = None
    chat_template_digest: Sha256 | None = None
    """None also when the base has no chat template."""


class LoraShape(Record):
    rank: Annotated[int, Field(ge=1, le=2**31 - 1)]
    """The largest rank of any module: what the engine must have room for. The wire has 32 bits for it."""
    alpha: FiniteFloat
    target_modules: list[str]
    use_rslora: bool = False


class DataRecord(Record):
    path: str
    sha256: Sha256
    format: str | None = None
    """Container and row format, and how they were found."""
    rows_used: Count
    rows_held_out: Count = 0
    """Of the used ones: for validation."""
    rows_truncated: Count = 0
    """Of the used ones."""
    rows_redacted: Count = 0
    """Of the used ones: personal data was replaced."""
    rows_dropped: Count = 0
    dropped_by_reason: dict[str, Count] = {}


class Probe(Record):
    """A prompt and the greedy answer of the model that was published; serving replays it before it routes to it."""

    prompt_token_ids: list[TokenId]
    completion_token_ids: list[TokenId]


class ManifestDraft(Record):
    """What a publisher knows; the registry adds files, schema version and time."""

    kind: Literal["lora", "merged", "gptq"]
    name: str
    base_model: BaseModelIdentity
    lora: LoraShape | None = None
    """Present exactly for kind ``lora``."""
    dtype: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    """As torch names it: float32, bfloat16, float16, int4."""
    recipe: dict[str, JsonValue] | None = None
    data: list[DataRecord] = []
    seed: int | None = None
    library_versions: dict[str, str] = {}
    job_id: str | None = None
    tenant: str | None = None
    """Whose it is; nobody else sees it. None: it is shared by all."""
    parents: list[str] = []
    """Revisions this one was made from."""
    quantized_from: Sha256 | None = None
    """Fingerprint of the model whose weights were quantised, for kind ``gptq``: its adapters fit this one too."""
    metrics: dict[str, FiniteFloat] = {}
    probes: list[Probe] = []

    @field_validator("name")
    @classmethod
    def _is_name(cls, value: str) -> str:
        return check_name(value)

    @model_validator(mode="after")
    def _lora_fits_kind(self) -> ManifestDraft:
        if (self.kind == "lora") != (self.lora is not None):
            has = "no" if self.lora is None else "a"
            raise ValueError(f"kind is {self.kind!r} with {has} lora shape; kind 'lora' needs one, others have none")
        return self


class Manifest(ManifestDraft):
    schema_version: Literal[1]
    created_at: Count
    """Unix seconds of the first publication."""
    files: dict[str, FileRecord]
    """By path relative to the artifact's directory; ``manifest.json`` itself is not among them."""

    @field_validator("files")
    @classmethod
    def _paths_stay_inside(cls, value: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for path in value:
            check_relative_path(path)
        if MANIFEST_NAME in value:
            raise ValueError(f"{MANIFEST_NAME} cannot list itself")
        return value

    @classmethod
    def from_draft(cls, draft: ManifestDraft, *, files: dict[str, FileRecord], created_at: int) -> Manifest:
        shared = {name: getattr(draft, name) for name in ManifestDraft.model_fields}
        return cls(schema_version=SCHEMA_VERSION, created_at=created_at, files=files, **shared)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a stored manifest.

        Raises:
            InvalidArtifactError: these bytes are no manifest that this version of Capo understands.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            version = _schema_version(data)
            if version is not None and version != SCHEMA_VERSION:
                raise InvalidArtifactError(
                    f"The manifest has schema version {version}; this Capo reads version {SCHEMA_VERSION}. "
                    "Use the version of Capo that wrote it, or a newer one.",
                    code="unsupported_schema_version",
                ) from error
            raise InvalidArtifactError(f"Not a manifest: {_reasons(error)}.", code="invalid_manifest") from error

    def to_bytes(self) -> bytes:
        """The canonical bytes.

        Raises:
            InvalidArtifactError: the manifest holds something that does not survive a round trip through JSON,
                like NaN in the recipe, or is too large.
        """
        try:
            text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
            data = text.encode("ascii")
        except ValueError as error:
            raise InvalidArtifactError(
                f"The manifest cannot be written as JSON: {error}. Use finite numbers.",
                code="invalid_manifest",
            ) from error
        if len(data) > MAX_MANIFEST_BYTES:
            raise InvalidArtifactError(
                f"The manifest has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are allowed. Publish fewer probes.",
                code="invalid_manifest",
            )
        if Manifest.from_bytes(data) != self:
            raise InvalidArtifactError(
                "The manifest reads back different from what was written. Use plain JSON values in the recipe.",
                code="invalid_manifest",
            )
        return data

    def is_same_content(self, other: Manifest) -> bool:
        """Whether both say the same apart from the time of publication."""
        return self == other.model_copy(update={"created_at": self.created_at})


def manifest_digest(data: bytes) -> str:
    """The artifact's digest: sha256 (hex) of the manifest's bytes."""
    return hashlib.sha256(data).hexdigest()


def _reasons(error: ValidationError) -> str:
    reasons = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()[:3]]
    return "; ".join(reasons)


def _schema_version(data: bytes) -> int | None:
    try:
        parsed = parse_strict_json(data)
    except ValueError:
        return None
    version = parsed.get("schema_version") if isinstance(parsed, dict) else None
    return version if isinstance(version, int) else None
