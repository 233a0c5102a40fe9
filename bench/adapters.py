"""Random LoRA adapters for capo-tiny: the right shapes, no meaning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from registry import BaseModel


def write_random_adapter(folder: Path, base: BaseModel, *, rank: int, seed: int, scale: float = 0.02) -> Path:
    """An all-linear adapter for a Llama-shaped base, in PEFT's format.

    ``scale`` is the standard deviation of its weights; the default is small enough to leave the model alive.
    """
    folder.mkdir(parents=True)
    config = json.loads((base.path / "config.json").read_bytes())
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (num_in, num_out) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = random.normal(scale=scale, size=(rank, num_in)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = random.normal(scale=scale, size=(num_out, rank)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.id,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [name.partition(".")[2] for name in shapes],
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
