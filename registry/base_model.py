"""Base models: where their files are, and who they are.

An adapter fits exactly one base model, and names and paths lie. So a base is known by digests of its files.
Hashing all weights of a large model at every start would take minutes; :func:`fingerprint` reads all small
files and a fixed sample of the weights instead, which tells apart models, revisions and fine-tunes, but is no
proof against somebody who edits single numbers on purpose.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

from registry.artifacts import Artifact
from registry.errors import InvalidArtifactError, InvalidNameError, ModelNotFoundError, UnavailableError
from registry.manifest import BaseModelIdentity
from registry.names import RevisionReference, check_base_model_id, parse_reference, shown
from registry.strict_json import parse_strict_json

EMBEDDED_MODEL_ID = "capo-tiny"
_EMBEDDED_MODELS_DIR = Path(__file__).parent / "models"

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""All that a tokenizer of any kind is kept in; the tokenizer's digest is taken over those that are there."""

_TEMPLATE_FILE = "chat_template.jinja"
_DOWNLOADED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]

_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class BaseModel:
    id: str
    path: Path
    """Directory with config.json, tokenizer and safetensors files."""
    identity: BaseModelIdentity
    quantized_from: str | None = None
    """Fingerprint of the model of which this one is a quantised copy, where its manifest says so."""

    def takes_adapters_of(self, base_fingerprint: str) -> bool:
        """Whether adapters trained on the base of this fingerprint belong here: it is this base, or this one is a
        quantised copy of exactly it. A copy of something merged or tuned first names that, and so does not take
        adapters of the model below it.
        """
        return base_fingerprint in (self.identity.fingerprint, self.quantized_from)


class ArtifactResolver(Protocol):
    """The part of :class:`registry.Registry` that is needed here."""

    def resolve(self, reference: str) -> Artifact: ...


def locate_base_model(reference: str, registry: ArtifactResolver | None = None) -> BaseModel:
    """Find a base model by the first of these that fits: the embedded ``capo-tiny``; an existing local
    directory (its id is its name); ``name@revision`` of a merged or gptq artifact; a Hugging Face id,
    downloaded if it is not in the local cache (blocks for the download; HF_HUB_OFFLINE=1 forbids it).

    Raises:
        InvalidNameError: no model can have this name.
        ModelNotFoundError: it is nowhere.
        InvalidArtifactError: it was found but is not usable as a base.
        UnavailableError: the hub cannot be reached.
    """
    if reference == EMBEDDED_MODEL_ID:
        return _embedded()
    directory = Path(reference)
    if reference and "\0" not in reference and directory.is_dir():
        return _described(check_base_model_id(directory.resolve().name), directory.absolute())
    check_base_model_id(reference)
    if "@" in reference:
        return _from_registry(reference, registry)
    return _described(reference, _download(reference))


def identify(model_id: str, directory: Path) -> BaseModelIdentity:
    """Digests of the base model in ``directory``; reads its small files and samples its weights.

    Raises:
        InvalidArtifactError: it has no config.json or safetensors weights, or wants to run code of its own.
        OSError: a file cannot be read.
    """
    config = _read_config(directory)
    template = _chat_template(directory)
    return BaseModelIdentity(
        id=model_id,
        fingerprint=fingerprint(directory),
        config_digest=hashlib.sha256(config).hexdigest(),
        tokenizer_digest=_tokenizer_digest(directory),
        chat_template_digest=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    )


def fingerprint(directory: Path) -> str:
    """sha256 (hex) over config.json, the tokenizer's files and a sample of each ``*.safetensors``, by name.

    Of a weights file: its size, its whole header (names, types and shapes) and 64 pieces of 4 KiB, evenly
    spaced from the first byte of the tensors to the last; all of it if it is no larger than that. Every part
    goes into the digest behind its name and length, so that no two sets of files give the same input.
    """
    digest = hashlib.sha256(b"capo base model fingerprint 1\n")
    for name in ("config.json", *TOKENIZER_FILES):
        path = directory / name
        if path.is_file():
            _add(digest, name, path.read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as weights:
            for label, data in _samples(weights):
                _add(digest, f"{path.name} {label}", data)
    return digest.hexdigest()


def _embedded() -> BaseModel:
    directory = _EMBEDDED_MODELS_DIR / EMBEDDED_MODEL_ID
    if not (directory / "config.json").is_file():
        raise ModelNotFoundError(
            f"The embedded model {EMBEDDED_MODEL_ID} is missing from this installation. Install Capo again.",
            param="model",
        )
    return _described(EMBEDDED_MODEL_ID, directory)


def _from_registry(reference: str, registry: ArtifactResolver | None) -> BaseModel:
    if not isinstance(parse_reference(reference), RevisionReference) or registry is None:
        raise InvalidNameError(
            f"{shown(reference)} is a revision; finding it takes a registry. Give one, or a directory or model id."
        )
    artifact = registry.resolve(reference)
    if artifact.manifest.kind == "lora":
        raise InvalidArtifactError(
            f"{artifact.revision} is a LoRA adapter, which needs a base itself. Merge it first, then use the "
            "merged model.",
            code="base_is_an_adapter",
        )
    described = _described(artifact.revision, artifact.path)
    return replace(described, quantized_from=artifact.manifest.quantized_from)


def _download(model_id: str) -> Path:
    # Function-local, because only this one way to a base model needs the library.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model_id, allow_patterns=_DOWNLOADED))
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"There is no model {shown(model_id)}: no local directory of this name and no such id at Hugging Face.",
            param="model",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UnavailableError(
            f"The model {shown(model_id)} is neither a local directory nor in the local cache, and Hugging "
            f"Face cannot be reached. Download it first, or use {EMBEDDED_MODEL_ID}, which is always here.",
        ) from error


def _described(model_id: str, directory: Path) -> BaseModel:
    return BaseModel(model_id, directory, identify(model_id, directory))


def _read_config(directory: Path) -> bytes:
    path = directory / "config.json"
    if not path.is_file() or not any(directory.glob("*.safetensors")):
        raise InvalidArtifactError(
            f"The directory {shown(directory.name)} is no base model: it needs config.json and *.safetensors "
            "weights. Convert other weights with transformers' save_pretrained.",
            code="invalid_base_model",
        )
    data = path.read_bytes()
    try:
        config = parse_strict_json(data)
    except ValueError as error:
        raise InvalidArtifactError(
            f"The base model's config.json is not JSON: {str(error)[:200]}.", code="invalid_base_model"
        ) from error
    if not isinstance(config, dict) or "auto_map" in config:
        # With auto_map a loader would import Python files beside the weights (vLLM CVE-2026-22807).
        raise InvalidArtifactError(
            "The base model's config.json brings code of its own (auto_map), or is no object. Use a model "
            "that transformers knows by itself.",
            code="custom_code_not_allowed",
        )
    return data


def _tokenizer_digest(directory: Path) -> str | None:
    digest = hashlib.sha256()
    present = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    for name in present:
        _add(digest, name, (directory / name).read_bytes())
    return digest.hexdigest() if present else None


def _chat_template(directory: Path) -> str | None:
    """The template's text, from either place where transformers keeps it, so that both give the same digest."""
    path = directory / _TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        config = parse_strict_json(path.read_bytes())
    except ValueError as error:
        raise InvalidArtifactError(
            f"The base model's tokenizer_config.json is not JSON: {str(error)[:200]}.",
            code="invalid_base_model",
        ) from error
    template = config.get("chat_template") if isinstance(config, dict) else None
    # Older models hold a list of named templates.
    return template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)


def _samples(weights: BinaryIO) -> list[tuple[str, bytes]]:
    size_bytes = weights.seek(0, 2)
    weights.seek(0)
    prefix = weights.read(8)
    header = weights.read(min(int.from_bytes(prefix, "little"), size_bytes))
    data_start = weights.tell()
    parts = [("size", str(size_bytes).encode()), ("header", prefix + header)]
    data_bytes = size_bytes - data_start
    if data_bytes <= _NUM_SAMPLES * _SAMPLE_BYTES:
        return [*parts, ("data", weights.read())]
    for index in range(_NUM_SAMPLES):
        offset = index * (data_bytes - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1)
        weights.seek(data_start + offset)
        parts.append((f"data at {offset}", weights.read(_SAMPLE_BYTES)))
    return parts


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def _add(digest: _Hash, name: str, data: bytes) -> None:
    digest.update(f"{name} {len(data)}\n".encode())
    digest.update(data)
