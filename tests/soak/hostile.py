"""Broken and hostile adapters by the hundred, planted where only the serving gate can refuse them.

Each begins as a sound adapter and gets one kind of damage from :mod:`tests.soak.damage`. Then a manifest is written
that vouches for the bytes as they are (unless lying is the damage), and the directory is moved into the registry
behind its back, as somebody with write access could do it.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from registry import BaseModel

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
RANK = 4


@dataclass(slots=True)
class Tensor:
    dtype: str
    shape: list[int]
    data: bytes


@dataclass(slots=True)
class Case:
    """One adapter on its way into the registry, for the damage to work on."""

    random_of: random.Random
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    manifest: dict[str, Any]
    weights: Callable[[dict[str, Tensor]], bytes] | None = None
    """Writes the weights file; not set: as the format has it."""
    config_bytes: bytes | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    """More files, or others in place of the two."""
    before_manifest: list[Callable[[Path], object]] = field(default_factory=list)
    after_manifest: list[Callable[[Path], object]] = field(default_factory=list)
    after_naming: list[Callable[[Path], object]] = field(default_factory=list)
    """Done to the directory that is already named by the digest of its manifest."""


@dataclass(frozen=True, slots=True)
class Damage:
    kind: str
    codes: frozenset[str]
    """The refusals that fit it."""
    apply: Callable[[Case], None]
    is_artifact: bool = True
    """False: it is no artifact at all. The model does not exist, and the list of adapters says why."""


@dataclass(frozen=True, slots=True)
class Planted:
    kind: str
    codes: frozenset[str]
    is_artifact: bool
    revision: str


def plant(root: Path, base: BaseModel, name: str, damage: Damage, random_of: random.Random) -> Planted:
    """Write one damaged adapter into the registry at ``root``."""
    case = _sound(base, name, random_of)
    damage.apply(case)
    directory = root.parent / "planting" / name / "directory"
    directory.mkdir(parents=True)
    (directory / WEIGHTS).write_bytes((case.weights or safetensors_bytes)(case.tensors))
    config_bytes = json.dumps(case.config).encode() if case.config_bytes is None else case.config_bytes
    (directory / CONFIG).write_bytes(config_bytes)
    for path, content in case.files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    for change in case.before_manifest:
        change(directory)
    manifest = {"files": _records(directory), **case.manifest}
    data = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    (directory / MANIFEST).write_bytes(data)
    for change in case.after_manifest:
        change(directory)
    digest = hashlib.sha256(data).hexdigest()
    directory.rename(directory.with_name(digest))
    for change in case.after_naming:
        change(directory.with_name(digest))
    # One rename shows the name and the artifact below it together.
    directory.parent.rename(root / "artifacts" / name)
    return Planted(damage.kind, damage.codes, damage.is_artifact, f"{name}@{digest[:16]}")


def safetensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    """The format's plain form (https://github.com/huggingface/safetensors#format)."""
    return header_bytes(tensors) + b"".join(tensor.data for tensor in tensors.values())


def header_bytes(tensors: dict[str, Tensor]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return len(header).to_bytes(8, "little") + header


def floats(random_of: random.Random, *shape: int) -> Tensor:
    values = np.random.default_rng(random_of.getrandbits(32)).normal(scale=0.02, size=shape).astype(np.float32)
    return Tensor("F32", list(shape), values.tobytes())


def module_shapes(base: BaseModel) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear module of a Llama-shaped base."""
    config = json.loads((base.path / "config.json").read_bytes())
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    per_layer = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in per_layer.items()}


def put_pair(case: Case, module: str, num_in: int, num_out: int, *, rank: int = RANK) -> None:
    case.tensors[f"base_model.model.{module}.lora_A.weight"] = floats(case.random_of, rank, num_in)
    case.tensors[f"base_model.model.{module}.lora_B.weight"] = floats(case.random_of, num_out, rank)


def _sound(base: BaseModel, name: str, random_of: random.Random) -> Case:
    shapes = module_shapes(base)
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.id,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    manifest = {
        "schema_version": 1,
        "kind": "lora",
        "name": name,
        "created_at": int(time.time()),
        "base_model": base.identity.model_dump(mode="json"),
        "lora": {"rank": RANK, "alpha": 2.0 * RANK, "target_modules": targets, "use_rslora": False},
        "dtype": "float32",
    }
    case = Case(random_of, {}, config, manifest)
    for module, (num_in, num_out) in shapes.items():
        put_pair(case, module, num_in, num_out)
    assert all(len(tensor.data) == 4 * math.prod(tensor.shape) for tensor in case.tensors.values())
    return case


def _records(directory: Path) -> dict[str, dict[str, Any]]:
    """What a manifest that hides nothing says: every regular file, links followed."""
    return {
        str(path.relative_to(directory)): {
            "size_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
