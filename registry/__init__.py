"""The contract between tuning and serving: names, artifacts, aliases, and the checks that both sides trust.

    from pathlib import Path
    from registry import ManifestDraft, Registry, locate_base_model

    registry = Registry(Path("capo-data/registry"))
    base = locate_base_model("capo-tiny", registry)
    with registry.stage() as staging:
        (staging / "model.safetensors").write_bytes((base.path / "model.safetensors").read_bytes())
        draft = ManifestDraft(kind="merged", name="support", base_model=base.identity, dtype="float32")
        artifact = registry.publish(staging, draft, alias="support")
    assert registry.resolve("support") == registry.resolve(artifact.revision) == artifact
    assert registry.verify("support") == []

Importing this package costs the standard library and pydantic: no torch, numpy, vllm or web framework.
"""

from registry.adapter_config import MAX_RANK, AdapterConfig
from registry.adapter_files import AdapterReport, check_adapter
from registry.aliases import Alias, Canary, CanaryRequest, HistoryEntry, Seen
from registry.artifacts import Artifact, DamagedArtifact
from registry.base_model import EMBEDDED_MODEL_ID, BaseModel, fingerprint, identify, locate_base_model
from registry.durable import Filesystem
from registry.garbage import GcReport
from registry.manifest import (
    BaseModelIdentity,
    DataRecord,
    FileRecord,
    LoraShape,
    Manifest,
    ManifestDraft,
    Probe,
)
from registry.names import (
    RESERVED_NAMES,
    AliasName,
    FineTunedName,
    Reference,
    RevisionReference,
    check_base_model_id,
    check_name,
    parse_reference,
)
from registry.safetensors_header import SafetensorsHeader, TensorEntry, read_header
from registry.store import Registry

__all__ = [
    "EMBEDDED_MODEL_ID",
    "MAX_RANK",
    "RESERVED_NAMES",
    "AdapterConfig",
    "AdapterReport",
    "Alias",
    "AliasName",
    "Artifact",
    "BaseModel",
    "BaseModelIdentity",
    "Canary",
    "CanaryRequest",
    "DamagedArtifact",
    "DataRecord",
    "FileRecord",
    "Filesystem",
    "FineTunedName",
    "GcReport",
    "HistoryEntry",
    "LoraShape",
    "Manifest",
    "ManifestDraft",
    "Probe",
    "Reference",
    "Registry",
    "RevisionReference",
    "SafetensorsHeader",
    "Seen",
    "TensorEntry",
    "check_adapter",
    "check_base_model_id",
    "check_name",
    "fingerprint",
    "identify",
    "locate_base_model",
    "parse_reference",
    "read_header",
]
