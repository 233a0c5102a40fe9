"""Trained weights as files that other tools load: a PEFT adapter, or a whole model directory.

An adapter is stored in the dtype it computes in: float32 recipes keep float32, because engines round once when
they load and rounding twice gains nothing; bfloat16 recipes store bfloat16, exactly what the engine will hold.
``tune.model.round_weights`` runs before the last validation, so figures and probes belong to the stored bytes.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from registry.errors import InvalidArtifactError
from registry.manifest import LoraShape
from tune.adapters import resolved_patterns
from tune.choices import Choice
from tune.exports.model_files import copy_companions
from tune.methods import publishes_adapter
from tune.model import DtypeName, StoredDtypeName, Trainable
from tune.recipe import Recipe


def choose_save_dtype(recipe: Recipe, dtype: DtypeName) -> Choice[StoredDtypeName]:
    if recipe.save_dtype != "auto":
        return Choice(recipe.save_dtype, "given in the recipe")
    if not publishes_adapter(recipe.method):
        return Choice("bfloat16", "engines serve whole models in it, and it halves the file")
    if dtype == "float16":
        return Choice("float32", "what is trained stays float32 beside a float16 base")
    return Choice(dtype, "an adapter keeps the dtype it was trained in")


def export_adapter(trainable: Trainable, directory: Path, *, base_id: str, save_dtype: StoredDtypeName) -> LoraShape:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's format, of a model PEFT wrapped, which
    may be in the middle of its training.

    Tokenizer and template stay with the base; the manifest's digests tie the adapter to them.
    """
    from peft import get_peft_model_state_dict

    config = copy.copy(trainable.model.peft_config["default"])
    config.base_model_name_or_path = base_id  # the id, not the directory it happened to be loaded from
    config.inference_mode = True
    config.rank_pattern, config.alpha_pattern = resolved_patterns(trainable.model)
    weights = get_peft_model_state_dict(trainable.model, save_embedding_layers=False)
    stored = {name: _stored(weight, save_dtype) for name, weight in weights.items()}
    save_file(stored, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    return LoraShape(
        rank=max(len(weight) for name, weight in weights.items() if "lora_A" in name),
        alpha=config.lora_alpha,
        target_modules=list(trainable.target_modules),
        use_rslora=config.use_rslora,
    )


def load_adapter(trainable: Trainable, directory: Path) -> None:
    """Put the weights of an adapter that :func:`export_adapter` wrote in the place of the model's own.

    Raises:
        InvalidArtifactError: the adapter has other layers than the model's.
    """
    stored = load_file(directory / "adapter_model.safetensors")
    parameters = dict(trainable.parameters())
    names = {name: name.replace(".default.weight", ".weight") for name in parameters}
    odd = stored.keys() ^ set(names.values())
    if odd:
        raise InvalidArtifactError(
            f"the adapter in {directory.name[:16]} and the model it should go on in differ in {len(odd)} weights, such "
            f"as {min(odd)}; start from the base",
            code="adapter_cannot_go_on",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[names[name]])


def export_model(trainable: Trainable, base_dir: Path, directory: Path, *, save_dtype: StoredDtypeName) -> None:
    """Write a model directory that transformers and vLLM load. Casts the model in place: it is used up.

    Tied weights stay tied: ``save_pretrained`` writes them once, under the input embedding's name.
    """
    model = trainable.model.to(torch.bfloat16 if save_dtype == "bfloat16" else torch.float32)
    model.config.use_cache = True  # switched off for training only
    model.save_pretrained(directory, safe_serialization=True)
    copy_companions(base_dir, directory)


def _stored(weight: torch.Tensor, save_dtype: StoredDtypeName) -> torch.Tensor:
    dtype = torch.bfloat16 if save_dtype == "bfloat16" else torch.float32
    return weight.detach().to("cpu", dtype).contiguous()
