"""Stages of preferences: the loss by hand, its reference across stages and stops, and stages one after the other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.errors import InvalidRequestError, StorageError
from tests.tune.samples import COLOURS, THINGS, write_jsonl
from tests.tune.test_methods import load
from tests.tune.workshop import Recorder, StopAfter, Workshop, weights_of
from tune.data.mask import Example
from tune.data.pairs import PreferenceExample
from tune.dpo import PreferenceObjective, Reference
from tune.methods import LoraMethod
from tune.model import Trainable
from tune.progress import StopRequested
from tune.recipe import Dpo
from tune.recipe_file import parse_recipe


def preference_rows(number: int) -> list[dict[str, Any]]:
    rows = []
    for index in range(number):
        thing = THINGS[index % 8]
        right, wrong = COLOURS[index % 8], COLOURS[(index + 3) % 8]
        rows.append(
            {
                "input": {"messages": [{"role": "user", "content": f"What colour is the {thing} {index // 8}?"}]},
                "preferred_output": [{"role": "assistant", "content": f"The {thing} is {right}."}],
                "non_preferred_output": [{"role": "assistant", "content": f"It is {wrong}, I think, or not."}],
            }
        )
    return rows


@pytest.fixture
def preferring(workshop: Workshop) -> Workshop:
    write_jsonl(workshop.root / "preferences.jsonl", preference_rows(24))
    return workshop


def dpo_stage(**changes: Any) -> dict[str, Any]:
    stage = {"kind": "dpo", "data": [{"path": "preferences.jsonl"}], "learning_rate": 3e-3, "max_steps": 4}
    return stage | {"micro_batch_size": 2, "gradient_accumulation_steps": 2} | changes


def pairs_of_different_lengths() -> list[PreferenceExample]:
    def example(prompt: int, answer: int, first: int) -> Example:
        ids = torch.arange(first, first + prompt + answer).numpy().astype("int32")
        return Example(ids, ids >= first + prompt, 1)

    sizes = ((5, 3, 9), (7, 6, 2), (4, 1, 1), (6, 8, 4))
    return [
        PreferenceExample(example(prompt, chosen, 10 * n), example(prompt, rejected, 10 * n + 100))
        for n, (prompt, chosen, rejected) in enumerate(sizes, start=1)
    ]


def trained_a_little(base_dir: Path) -> Trainable:
    trainable = load(base_dir, LoraMethod(rank=4))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in trainable.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)
    return trainable


def log_probability(model: Any, example: Example) -> torch.Tensor:
    """Of the answer, one row at a time and without a line of ours."""
    ids = torch.tensor([example.token_ids.tolist()])
    logarithms = model(ids).logits[0, :-1].log_softmax(-1)
    tokens = logarithms.gather(1, ids[0, 1:, None])[:, 0]
    return tokens[torch.tensor(example.trained.tolist())[1:]].sum()


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_loss_and_gradient_are_the_papers_and_do_not_depend_on_micro_batches(base_dir: Path, sft_weight: float) -> None:
    """The reference by hand is the base: the same model with its adapter switched off."""
    trainable = trained_a_little(base_dir)
    pairs = pairs_of_different_lengths()
    model = trainable.model.eval()
    total = torch.zeros(())
    for pair in pairs:
        with torch.no_grad(), model.disable_adapter():
            base = log_probability(model, pair.chosen), log_probability(model, pair.rejected)
        chosen, rejected = log_probability(model, pair.chosen), log_probability(model, pair.rejected)
        margin = 0.3 * ((chosen - base[0]) - (rejected - base[1]))
        total = total - torch.log(torch.sigmoid(margin)) - sft_weight * chosen / pair.chosen.num_trained
    (total / len(pairs)).backward()
    expected = {name: parameter.grad.clone() for name, parameter in trainable.parameters()}

    reference = Reference()
    with model.disable_adapter():
        reference.measure(trainable, pairs, 3)
    objective = PreferenceObjective(pairs, Dpo(beta=0.3, sft_weight=sft_weight), reference)
    for size in (1, 2, 4):
        model.zero_grad()
        measured = 0.0
        for start in range(0, len(pairs), size):
            losses = objective.losses(trainable, [(i,) for i in range(start, start + size)])
            (losses.total / len(pairs)).backward()
            measured += float(losses.total.detach())
        assert measured == pytest.approx(float(total.detach()), rel=1e-4)
        for name, parameter in trainable.parameters():
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_reference_is_what_the_stage_before_made(preferring: Workshop, method: str) -> None:
    """Then the first loss of the stage is ln 2, though sft has moved the model away from the base."""
    observer = Recorder()
    stages = [preferring.sft(epochs=None, max_steps=6, learning_rate=3e-3), dpo_stage(validation={"share": 0.2})]
    metrics = preferring.run(preferring.recipe(method={"kind": method}, stages=stages), observer=observer).metrics
    first, *_, last = (step for step in observer.steps if step.stage == "2-dpo")
    assert first.train_loss == pytest.approx(math.log(2), abs=1e-4)
    assert metrics["2-dpo.before_valid_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert last.train_loss < first.train_loss - 0.05
    assert last.figures["rewards/margins"] > 0.1
    assert metrics["2-dpo.valid_loss"] < math.log(2)


@pytest.mark.parametrize("stop_after", [2, 4, 5])
def test_a_stopped_run_goes_on_with_the_same_reference(preferring: Workshop, stop_after: int) -> None:
    """Stopped in sft, between the stages, and in dpo, where the reference's weights are gone."""
    stages = [preferring.sft(epochs=None, max_steps=3), dpo_stage(validation={"share": 0.2})]
    recipe = preferring.recipe(method={"kind": "lora", "rank": 4}, stages=stages)
    whole, first, second = Recorder(), Recorder(), Recorder()
    expected = preferring.run(recipe, "whole", whole)
    with pytest.raises(StopRequested):
        preferring.run(recipe, "broken", first, StopAfter(stop_after))
    result = preferring.run(recipe, "broken", second)
    joined = [(m.stage, m.step, m.train_loss) for m in first.steps + second.steps]
    assert joined == [(m.stage, m.step, m.train_loss) for m in whole.steps]
    assert weights_of(result.artifact) == weights_of(expected.artifact)
    assert result.metrics == expected.metrics
    assert not (preferring.root / "broken" / "references").exists()


def test_a_lost_reference_is_not_made_up(preferring: Workshop) -> None:
    recipe = preferring.recipe(stages=[dpo_stage()])
    with pytest.raises(StopRequested):
        preferring.run(recipe, should_stop=StopAfter(2))
    for path in (preferring.root / "work" / "references").iterdir():
        path.unlink()
    with pytest.raises(StorageError, match=r"the weights they came from are gone.*start it again"):
        preferring.run(recipe)


def test_rewards_stand_in_tensorboard(preferring: Workshop) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    preferring.run(preferring.recipe(stages=[dpo_stage()]))
    log = EventAccumulator(str(preferring.root / "work" / "tensorboard"))
    log.Reload()
    for name in ("margins", "chosen", "rejected", "accuracies"):
        assert [event.step for event in log.Scalars(f"1-dpo/rewards/{name}")] == [1, 2, 3, 4]


def test_text_and_chats_share_a_mixed_stage_each_with_its_own_loss(workshop: Workshop) -> None:
    observer = Recorder()
    stage = {"kind": "mixed", "data": [{"path": "text.jsonl"}, {"path": "chat.jsonl"}], "epochs": 1}
    stages = [workshop.cpt(epochs=1, validation=None), workshop.sft(epochs=1, validation=None), stage]
    result = workshop.run(workshop.recipe(stages=stages), observer=observer)
    tokens = {}
    for step in observer.steps:
        tokens[step.stage] = step.trained_tokens
    assert tokens["3-mixed"] - tokens["2-sft"] == tokens["2-sft"], "as many as one pass of each trains"
    assert [record.path for record in result.artifact.manifest.data][-2:] == ["text.jsonl", "chat.jsonl"]


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"kind": "sft", "dpo": {"beta": 0.1}}, "dpo holds options of a dpo stage, and the kind of this one is sft"),
        ({"kind": "dpo", "packing": True}, "a dpo stage compares two answers; remove packing"),
        ({"kind": "dpo", "dpo": {"beta": 0}}, "greater than 0"),
        ({"kind": "dpo", "dpo": {"bta": 1}}, "did you mean 'beta'"),
    ],
)
def test_a_stage_refuses_options_that_are_not_its_own(stage: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        parse_recipe({"name": "x", "base_model": "b", "stages": [{"data": [{"path": "x"}]} | stage]})
