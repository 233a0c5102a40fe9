"""Made-up bases, adapters and drafts, written with the safetensors library and numpy, not with the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from registry import BaseModelIdentity, ManifestDraft

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS, VOCABULARY = 32, 48, 4, 2, 2, 64

BASE_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
}

# (in, out) of each linear module, written down by hand.
MODULES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 48),
    "mlp.up_proj": (32, 48),
    "mlp.down_proj": (48, 32),
}

ADAPTER_CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "acme/tiny",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "r": 4,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}

Tensors = dict[str, np.ndarray[Any, Any]]


def write_base(directory: Path, **config: Any) -> Path:
    """A tiny Llama base with a tokenizer that is only there to be hashed."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(BASE_CONFIG | config))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    generator = np.random.default_rng(0)
    tensors = {
        f"model.layers.{layer}.{name}.weight": generator.normal(size=(rows, columns)).astype(np.float32)
        for layer in range(LAYERS)
        for name, (columns, rows) in MODULES.items()
    }
    tensors["model.embed_tokens.weight"] = np.zeros((VOCABULARY, HIDDEN), np.float32)
    save_file(tensors, directory / "model.safetensors")
    return directory


def adapter_tensors(*, rank: int = 4, dtype: Any = np.float32, seed: int = 0) -> Tensors:
    generator = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for name in ("self_attn.q_proj", "self_attn.v_proj"):
            columns, rows = MODULES[name]
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = generator.normal(size=(rank, columns)).astype(dtype)
            tensors[f"{stem}.lora_B.weight"] = generator.normal(size=(rows, rank)).astype(dtype)
    return tensors


def write_adapter(
    directory: Path,
    *,
    tensors: Tensors | None = None,
    change: Callable[[Tensors], None] | None = None,
    **config: Any,
) -> Path:
    """An adapter directory for :func:`write_base`; ``change`` edits the tensors, ``config`` the configuration."""
    directory.mkdir(parents=True)
    content = dict(adapter_tensors() if tensors is None else tensors)
    if change is not None:
        change(content)
    save_file(content, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | config))
    return directory


def draft(name: str = "support", **fields: Any) -> ManifestDraft:
    return ManifestDraft(
        name=name, **({"kind": "merged", "base_model": BaseModelIdentity(id="tiny"), "dtype": "float32"} | fields)
    )


def write_files(directory: Path, content: bytes, *, num_files: int = 2) -> Path:
    """A directory to publish: small files, one of them in a folder."""
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "tokenizer" / "vocab.json").write_bytes(b"{}" + content)
    for index in range(num_files):
        (directory / f"model-{index}.safetensors").write_bytes(content * (index + 1))
    return directory


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every path below, with a file's bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }
