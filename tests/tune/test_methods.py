"""Methods that train low-rank matrices: what a recipe may ask for, and that PEFT and an engine see the same adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from registry import locate_base_model
from registry.adapter_files import check_adapter
from registry.errors import InvalidRequestError
from tests.tune.workshop import Workshop
from tune.methods import DoraMethod, LoraMethod, Method, QloraMethod
from tune.model import Trainable, load_trainable
from tune.optimizers import make_optimizer, set_learning_rate
from tune.recipe import Stage
from tune.recipe_file import parse_recipe


def load(base_dir: Path, method: Method) -> Trainable:
    return load_trainable(
        base_dir, method, dtype="float32", device=torch.device("cpu"), seed=1, gradient_checkpointing=False
    )


def short(workshop: Workshop, **changes: Any) -> dict[str, Any]:
    return workshop.sft(epochs=None, max_steps=3) | changes


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"kind": "lora", "init": "pissa_niter_16"}, "changes the base's own weights.*use 'default'"),
        ({"kind": "lora", "init": "olora"}, "changes the base's own weights"),
        ({"kind": "dora", "init": "corda"}, "changes the base's own weights"),
        ({"kind": "lora", "init": "loftq"}, "changes the base's own weights.*use method kind 'qlora'"),
        ({"kind": "lora", "init": "eva"}, "needs a pass over the data before training"),
        ({"kind": "lora", "init": "orthogonal", "rank": 7}, "halves each rank and got 7"),
        ({"kind": "lora", "rank_pattern": {"q_(proj": 4}}, r"'q_\(proj' is no regular expression"),
        ({"kind": "lora", "rank_pattern": {"q_proj": 300}}, "has the rank 300; at most 256"),
        ({"kind": "lora", "alpha_pattern": {"q_proj": 0}}, "'q_proj' has 0; at least 1"),
        ({"kind": "lora", "loraplus_ratio": 0.5}, "greater than or equal to 1"),
        ({"kind": "lora", "extract_lora_rank": 8}, "unknown key 'extract_lora_rank'"),
        ({"kind": "freeze"}, "give either last_layers or trained"),
        ({"kind": "freeze", "last_layers": 1, "trained": "mlp"}, "give either last_layers or trained"),
        ({"kind": "freeze", "trained": "("}, "is no regular expression"),
    ],
)
def test_a_method_that_cannot_work_is_refused_with_the_reason(method: dict[str, Any], reason: str) -> None:
    stage = {"kind": "sft", "data": [{"path": "x"}]}
    with pytest.raises(InvalidRequestError, match=reason):
        parse_recipe({"name": "x", "base_model": "capo-tiny", "method": method, "stages": [stage]})


def test_a_pattern_that_matches_no_adapted_layer_is_refused(base_dir: Path) -> None:
    method = LoraMethod(target_modules=("q_proj",), rank_pattern={"mlp.up_proj": 4})
    with pytest.raises(InvalidRequestError, match=r"rank_pattern has the key 'mlp.up_proj', which matches no adapted"):
        load(base_dir, method)


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
@pytest.mark.parametrize("make", [LoraMethod, DoraMethod])
def test_every_init_begins_with_the_base_itself(base_dir: Path, init: Any, make: type[LoraMethod]) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12)[None]
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    adapted = load(base_dir, make(rank=4, init=init)).model.eval()
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, base(ids).logits, atol=1e-4)


def test_the_loraplus_rates_are_those_of_pefts_own_optimizer(base_dir: Path) -> None:
    from peft.optimizers import create_loraplus_optimizer

    trainable = load(base_dir, LoraMethod(rank=4, loraplus_ratio=16.0))
    stage = Stage.model_validate({"kind": "sft", "data": [{"path": "x"}]})
    ours = make_optimizer(trainable, stage, 2e-4)
    set_learning_rate(ours, 2e-4)
    theirs = create_loraplus_optimizer(trainable.model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16.0)

    def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
        return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert rates(ours) == pytest.approx(rates(theirs))
    assert sorted(set(rates(ours).values())) == pytest.approx([2e-4, 32e-4])


def test_an_adapter_with_patterns_is_stored_by_the_names_of_its_layers_and_loads_in_peft(workshop: Workshop) -> None:
    """A stranger's regular expressions are not evaluated when serving, so the gate takes names only."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    method = {
        "kind": "lora",
        "rank": 4,
        "rank_pattern": {r"layers\.1\.mlp\.(up|down)_proj": 8},
        "alpha_pattern": {"q_proj": 2, r"layers\.1\..*": 32},
        "use_rslora": True,
    }
    recipe = workshop.recipe(method=method, stages=[short(workshop)])
    artifact = workshop.run(recipe).artifact
    config = json.loads((artifact.path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {f"model.layers.1.mlp.{name}_proj": 8 for name in ("up", "down")}
    assert config["alpha_pattern"]["model.layers.0.self_attn.q_proj"] == 2
    assert config["alpha_pattern"]["model.layers.1.self_attn.q_proj"] == 2, "the first key that matches counts"
    assert config["alpha_pattern"]["model.layers.1.mlp.gate_proj"] == 32
    assert artifact.manifest.lora is not None
    assert artifact.manifest.lora.rank == 8
    report = check_adapter(artifact.path, base_model=locate_base_model(str(workshop.base_dir)))
    assert report.rank == 8
    # By hand from the files: W + alpha / sqrt(r) * B A, with the patterns as the recipe says them.
    weights = load_file(artifact.path / "adapter_model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(workshop.base_dir, dtype=torch.float32).eval()
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(workshop.base_dir, dtype=torch.float32), artifact.path
    ).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in weights:
                rank = 8 if "layers.1.mlp.up" in name or "layers.1.mlp.down" in name else 4
                alpha = 2 if "q_proj" in name else 32 if "layers.1." in name else 8
                change = weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
                parameter += alpha / rank**0.5 * change
        assert torch.allclose(merged(ids).logits, stock(ids).logits, atol=1e-4)


def test_gradients_of_a_4_bit_base_are_right_also_after_a_validation(base_dir: Path) -> None:
    """Against a float model that holds the dequantised weights. bitsandbytes packs weights when it evaluates."""
    import bitsandbytes.functional

    ids = torch.arange(3, 27)[None]
    quantised = load(base_dir, QloraMethod(rank=4))
    plain = load(base_dir, LoraMethod(rank=4))
    layers = dict(quantised.model.named_modules())
    quantised.model.eval()
    with torch.no_grad():
        quantised.model(ids)
        for name, module in plain.model.named_modules():
            packed = layers[name].weight if name.endswith("base_layer") else None
            if packed is not None:
                module.weight.copy_(bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state))
        random = torch.Generator().manual_seed(3)
        for (_, ours), (_, theirs) in zip(quantised.parameters(), plain.parameters(), strict=True):
            ours.copy_(torch.randn(ours.shape, generator=random) * 0.1)
            theirs.copy_(ours)
    for trainable in (quantised, plain):
        trainable.model.train()
        trainable.model(ids, labels=ids).loss.backward()
    for (name, ours), (_, theirs) in zip(quantised.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5), name


def test_a_qlora_adapter_is_measured_on_the_base_that_serves_it(workshop: Workshop) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = workshop.run(workshop.recipe(method={"kind": "qlora", "rank": 4}, stages=[short(workshop)]))
    artifact = result.artifact
    assert artifact.manifest.kind == "lora"
    base = AutoModelForCausalLM.from_pretrained(workshop.base_dir, dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, artifact.path).eval()
    for probe in artifact.manifest.probes:
        prompt = torch.tensor([probe.prompt_token_ids])
        made = stock.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(probe.completion_token_ids),
            do_sample=False,
        )
        assert made[0, prompt.shape[1] :].tolist() == probe.completion_token_ids
    metrics = result.metrics
    assert metrics["quantization.mean_kl"] > 0
    assert metrics["1-sft.valid_loss"] != metrics["1-sft.quantized_valid_loss"]
    assert metrics["1-sft.valid_loss"] == pytest.approx(metrics["1-sft.quantized_valid_loss"], abs=0.2)
