"""Methods whose result is a model of its own, and LoRA adapters extracted from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from registry.errors import InvalidRequestError
from tests.tune.test_methods import load, short
from tests.tune.workshop import Recorder, Workshop
from tune.delivery import merge
from tune.extraction import extract_adapter
from tune.methods import DoraMethod, FreezeMethod


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}


def test_a_merged_dora_model_is_the_papers_formula(base_dir: Path) -> None:
    """W' = m (W + s B A) / |W + s B A| by rows of W (https://arxiv.org/abs/2402.09353, equation 5)."""
    trainable = load(base_dir, DoraMethod(rank=4, alpha=8))
    random = torch.Generator().manual_seed(3)
    trained = dict(trainable.parameters())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    trained = {name: parameter.detach().clone() for name, parameter in trained.items()}
    base = weights_of(base_dir)
    merged = dict(merge(trainable).model.named_parameters())
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        stem = f"base_model.model.{layer}"
        change = trained[f"{stem}.lora_B.default.weight"] @ trained[f"{stem}.lora_A.default.weight"]
        direction = base[f"{layer}.weight"] + 8 / 4 * change
        magnitude = trained[f"{stem}.lora_magnitude_vector.default.weight"]
        expected = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
        assert torch.allclose(merged[f"{layer}.weight"], expected, atol=1e-5), layer


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ({"kind": "freeze", "last_layers": 1}, r"layers.1."),
        ({"kind": "freeze", "trained": r"layers\.0\.mlp\.up"}, "layers.0.mlp.up_proj"),
        ({"kind": "dora", "target_modules": ["o_proj"]}, "o_proj"),
    ],
)
def test_a_published_model_differs_from_its_base_where_it_was_trained_and_nowhere_else(
    workshop: Workshop, method: dict[str, Any], changes: str
) -> None:
    recipe = workshop.recipe(method=method, save_dtype="float32", stages=[short(workshop)])
    artifact = workshop.run(recipe).artifact
    assert artifact.manifest.kind == "merged"
    base, tuned = weights_of(workshop.base_dir), weights_of(artifact.path)
    assert base.keys() == tuned.keys()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {name for name in base if changes in name}


def test_a_published_model_keeps_tied_weights_tied(workshop: Workshop) -> None:
    from transformers import AutoModelForCausalLM

    for kind in ("full", "dora"):
        artifact = workshop.run(
            workshop.recipe(name=kind, method={"kind": kind}, stages=[short(workshop)]), kind
        ).artifact
        assert "lm_head.weight" not in weights_of(artifact.path)
        assert json.loads((artifact.path / "config.json").read_text())["tie_word_embeddings"]
        model = AutoModelForCausalLM.from_pretrained(artifact.path)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_weights_that_the_base_does_not_have_are_refused(base_dir: Path) -> None:
    with pytest.raises(InvalidRequestError, match="last_layers=3, but this base has 2 layers"):
        load(base_dir, FreezeMethod(last_layers=3))
    with pytest.raises(InvalidRequestError, match=r"trained='lm_head' is found in no weight's name of this base \(its"):
        load(base_dir, FreezeMethod(trained="lm_head"))


def test_the_error_of_an_extraction_is_that_of_numpys_singular_values() -> None:
    """Eckart and Young: what is lost are the singular values that were cut off."""
    random = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (24, 40), "b.weight": (40, 16), "norm.weight": (40,)}
    base = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    tuned = {name: weight + 0.1 * torch.randn(weight.shape, generator=random) for name, weight in base.items()}
    extraction = extract_adapter(base, tuned, ["a", "b"], rank=6)
    lost = whole = 0.0
    for layer in ("a", "b"):
        change = (tuned[f"{layer}.weight"] - base[f"{layer}.weight"]).double().numpy()
        values = np.linalg.svd(change, compute_uv=False)
        expected = np.sqrt((values[6:] ** 2).sum() / (values**2).sum())
        assert extraction.relative_errors[layer] == pytest.approx(expected, rel=1e-4)
        lost, whole = lost + (values[6:] ** 2).sum(), whole + (values**2).sum()
    norm = float(((tuned["norm.weight"] - base["norm.weight"]).double() ** 2).sum())
    assert extraction.relative_error == pytest.approx(np.sqrt((lost + norm) / (whole + norm)), rel=1e-4)
    assert extraction.share_outside == pytest.approx(np.sqrt(norm / (whole + norm)), rel=1e-4)
    exact = extract_adapter(base, tuned, ["a", "b"], rank=40)
    assert max(exact.relative_errors.values()) < 1e-5
    assert exact.layers["b"].a.shape == (40, 16)


def test_an_adapter_extracted_from_dora_answers_like_the_tuned_weights(workshop: Workshop) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stages = [short(workshop, max_steps=12)]
    models = {}
    for name, rank in (("merged", None), ("extracted", 64)):
        method = {"kind": "dora", "rank": 4, "extract_lora_rank": rank}
        observer = Recorder()
        recipe = workshop.recipe(name=name, method=method, stages=stages, save_dtype="float32")
        models[name] = workshop.run(recipe, name, observer)
    artifact = models["extracted"].artifact
    assert artifact.manifest.kind == "lora"
    assert observer.said("a LoRA adapter of rank 64 was extracted from the tuned weights: 0.0% of the change")
    assert artifact.manifest.metrics["extraction.relative_error"] < 1e-3
    assert artifact.manifest.metrics["extraction.top1_agreement"] == 1.0
    base = AutoModelForCausalLM.from_pretrained(workshop.base_dir, dtype=torch.float32)
    by_adapter = PeftModel.from_pretrained(base, artifact.path).eval()
    by_weights = AutoModelForCausalLM.from_pretrained(models["merged"].artifact.path, dtype=torch.float32).eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(by_adapter(ids).logits, by_weights(ids).logits, atol=2e-3)


def test_the_figures_of_an_extracted_adapter_are_those_of_the_adapter(workshop: Workshop) -> None:
    """Rank 1 loses so much of full training that the two cannot be confused."""
    results = {}
    for name, rank in (("whole", None), ("little", 1)):
        method = {"kind": "full", "extract_lora_rank": rank}
        recipe = workshop.recipe(name=name, method=method, stages=[short(workshop, max_steps=12, learning_rate=3e-3)])
        results[name] = workshop.run(recipe, name).metrics
    assert results["little"]["1-sft.train_loss"] == results["whole"]["1-sft.train_loss"]
    assert results["little"]["1-sft.valid_loss"] > results["whole"]["1-sft.valid_loss"] + 0.1
    assert 0 < results["little"]["extraction.share_outside"] < results["little"]["extraction.relative_error"] < 1
