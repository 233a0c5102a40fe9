"""Models to judge: a directory, plain or GPTQ, with or without an adapter beside its layers. Frozen and in eval mode.

The adapter is added by hooks here, neither merged nor loaded by PEFT: so a merged export is compared with something
that shares no step with it, and nothing imports a quantisation library to look at plain layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from registry import Artifact, BaseModel, Registry, locate_base_model
from registry.adapter_config import read_adapter_config
from registry.adapter_files import WEIGHTS_NAME
from registry.errors import InvalidArtifactError
from tune.evaluation.gptq_weights import plain_weights, quantization_of

_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:A\.weight|embedding_A)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Judged:
    """What is to be judged, and what it came from."""

    name: str
    """As a person calls it."""
    base: BaseModel
    """The model below; of a whole model that was tuned, the one it was tuned from."""
    model_dir: Path
    adapter_dir: Path | None


def locate(reference: str, registry: Registry, base_model: str | None = None) -> tuple[Judged, Artifact]:
    """An artifact and the base to judge it against: ``base_model``, or what its manifest names.

    Raises:
        ModelNotFoundError: it, or the base that its manifest names, is nowhere.
        InvalidArtifactError: the base found under that name is not the one it was made from.
    """
    artifact = registry.resolve(reference)
    identity = artifact.manifest.base_model
    base = locate_base_model(base_model or identity.id, registry)
    if identity.fingerprint is not None and base.identity.fingerprint != identity.fingerprint:
        raise InvalidArtifactError(
            f"{artifact.revision} was made from {identity.id} (fingerprint {identity.fingerprint[:16]}); the one found "
            f"here has {str(base.identity.fingerprint)[:16]}. Put that very model in its place.",
            code="base_mismatch",
        )
    if artifact.manifest.kind == "lora":
        return Judged(artifact.revision, base, base.path, artifact.path), artifact
    return Judged(artifact.revision, base, artifact.path, None), artifact


def load(model_dir: Path, adapter_dir: Path | None = None, *, device: torch.device | None = None) -> Any:
    """Load in float32, so that what differs is the weights and not the arithmetic."""
    disable_progress_bar()
    model = _load_quantized(model_dir) if quantization_of(model_dir) else _load_plain(model_dir)
    model.to(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if adapter_dir is not None:
        add_adapter(model, adapter_dir)
    return model.eval().requires_grad_(False)


def add_adapter(model: Any, adapter_dir: Path) -> None:
    """Add ``scaling * B @ A @ x`` to the adapted layers' outputs (https://arxiv.org/abs/2106.09685, section 4.1)."""
    config = read_adapter_config(adapter_dir)
    weights = load_file(adapter_dir / WEIGHTS_NAME, device=str(model.device))
    for name in weights:
        match = _LORA.fullmatch(name)
        if match is None:
            continue
        module = match["module"]
        is_embedding = name.endswith("embedding_A")
        other = name.removesuffix("A") + "B" if is_embedding else name.replace("lora_A", "lora_B")
        a, b = weights[name].float(), weights[other].float()
        _hook(model.get_submodule(module), a, b, config.scaling_of(module), is_embedding=is_embedding)


def _hook(layer: Any, a: torch.Tensor, b: torch.Tensor, scaling: float, *, is_embedding: bool) -> None:
    def add(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        low = torch.nn.functional.embedding(inputs[0], a.T) if is_embedding else inputs[0] @ a.T  # [..., R]
        return output + scaling * (low @ b.T)

    layer.register_forward_hook(add)


def _load_plain(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
    )


def _load_quantized(directory: Path) -> Any:
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    missing = set(model.state_dict()) - {"lm_head.weight"} if config.tie_word_embeddings else set(model.state_dict())
    with torch.no_grad():
        state = model.state_dict()
        for name, weight in plain_weights(directory):
            if name not in state or state[name].shape != weight.shape:
                raise InvalidArtifactError(
                    f"{directory.name} holds {name} {list(weight.shape)}, which its config.json does not describe.",
                    code="invalid_base_model",
                )
            state[name].copy_(weight)
            missing.discard(name)
    if missing:
        raise InvalidArtifactError(
            f"{directory.name} lacks weights that its config.json describes: {', '.join(sorted(missing)[:3])}.",
            code="invalid_base_model",
        )
    return model
