"""Adapters of earlier epochs' ends: which are kept, that they are exact, and that nobody notices them being made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from registry import Artifact, BaseModelIdentity, LoraShape, ManifestDraft, Registry
from tests.tune.samples import chat_rows, text_rows, write_jsonl
from tests.tune.test_methods_dpo import preference_rows
from tests.tune.workshop import Recorder, StopAfter, Workshop, weights_of
from tune.checkpoint import CheckpointFolder
from tune.progress import StopRequested

NAME = "ft:tiny-base:acme::abc12345"
FOUR_EPOCHS = {"epochs": 4, "micro_batch_size": 4, "gradient_accumulation_steps": 2}
"""32 of 40 rows are trained on, in steps of 8."""


def kept(workshop: Workshop) -> dict[int, Artifact]:
    """By the step in their name."""
    names = [alias.alias for alias in workshop.registry.checkpoints(NAME)]
    return {int(name.rpartition("-")[2]): workshop.registry.resolve(name) for name in names}


def four_epochs(workshop: Workshop, **changes: Any) -> dict[str, Any]:
    recipe = {"method": {"kind": "lora", "rank": 4, "dropout": 0.1}, "stages": [workshop.sft(**FOUR_EPOCHS)]}
    return workshop.recipe(**(recipe | changes))


def test_the_last_three_epochs_are_kept_and_the_last_of_them_is_the_result(workshop: Workshop) -> None:
    observer = Recorder()
    result = workshop.run(four_epochs(workshop), observer=observer, fine_tuned_name=NAME, job_id="ftjob-1")
    per_epoch = result.steps // 4
    assert list(kept(workshop)) == [2 * per_epoch, 3 * per_epoch]
    for step, artifact in kept(workshop).items():
        assert artifact.manifest.job_id == "ftjob-1"
        assert artifact.manifest.metrics["step"] == step
        assert artifact.manifest.lora == result.artifact.manifest.lora
        assert workshop.registry.verify(artifact.revision) == []
        assert observer.said(f"Checkpoint created at step {step}: {NAME}:ckpt-step-{step}")
    assert workshop.registry.resolve(NAME) == result.artifact


def test_a_checkpoint_holds_the_weights_of_its_step(workshop: Workshop) -> None:
    """Held against the resumable checkpoint of another run of the same recipe, that was stopped there."""
    recipe = four_epochs(workshop)
    workshop.run(recipe, fine_tuned_name=NAME)
    for step, artifact in kept(workshop).items():
        with pytest.raises(StopRequested):
            workshop.run(recipe, f"stopped-{step}", should_stop=StopAfter(step))
        (folder,) = (workshop.root / f"stopped-{step}" / "checkpoints").glob("checkpoint-*")
        expected = load_file(folder / "weights.safetensors")
        found = load_file(artifact.path / "adapter_model.safetensors")
        assert len(found) == len(expected) > 0
        for name, weight in expected.items():
            assert torch.equal(found[name.replace(".default.weight", ".weight")], weight), name


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_a_run_ends_the_same_with_and_without_them(workshop: Workshop, save_dtype: str) -> None:
    recipe = four_epochs(workshop, save_dtype=save_dtype)
    without = workshop.run(recipe, "without")
    named = workshop.run(recipe, "with", fine_tuned_name=NAME)
    assert weights_of(named.artifact) == weights_of(without.artifact)
    assert named.metrics == without.metrics
    assert len(kept(workshop)) == 2
    stored = load_file(next(iter(kept(workshop).values())).path / "adapter_model.safetensors")
    assert {str(weight.dtype) for weight in stored.values()} == {f"torch.{save_dtype}"}


def test_their_figures_are_those_that_training_measured(workshop: Workshop) -> None:
    observer = Recorder()
    stage = workshop.sft(**FOUR_EPOCHS, evaluate_every_steps=1)
    workshop.run(four_epochs(workshop, stages=[stage]), observer=observer, fine_tuned_name=NAME)
    for step, artifact in kept(workshop).items():
        seen = observer.steps[step - 1]
        metrics = artifact.manifest.metrics
        assert (metrics["train_loss"], metrics["train_mean_token_accuracy"]) == (
            seen.train_loss,
            seen.train_mean_token_accuracy,
        )
        assert metrics["full_valid_loss"] == pytest.approx(seen.valid_loss, rel=1e-6)
        assert metrics["full_valid_mean_token_accuracy"] == seen.valid_mean_token_accuracy


class _Killed(Exception):
    pass


def killed_after_publishing(workshop: Workshop, recipe: dict[str, Any], step: int) -> None:
    """The checkpoint of ``step`` is published, and no resumable checkpoint is written any more."""
    publish = Registry.publish

    with pytest.MonkeyPatch.context() as patched:

        def is_killed(*_: Any) -> Path:
            raise _Killed

        def publish_and_be_killed(*given: Any, **named: Any) -> Artifact:
            artifact = publish(*given, **named)
            if named.get("fine_tuned_name") == f"{NAME}:ckpt-step-{step}":
                patched.setattr(CheckpointFolder, "save", is_killed)
            return artifact

        patched.setattr(Registry, "publish", publish_and_be_killed)
        with pytest.raises(_Killed):
            workshop.run(recipe, "killed", fine_tuned_name=NAME)


def test_killed_between_publication_and_checkpoint_it_publishes_nothing_twice_and_ends_the_same(
    workshop: Workshop,
) -> None:
    whole = Workshop(workshop.root, workshop.base_dir, Registry(workshop.root / "whole-registry"))
    recipe = four_epochs(workshop, checkpoint_every_steps=3)
    expected = whole.run(recipe, "whole", fine_tuned_name=NAME)
    first, second = kept(whole)
    for step in (first, first, second):
        killed_after_publishing(workshop, recipe, step)
    result = workshop.run(recipe, "killed", fine_tuned_name=NAME)
    assert weights_of(result.artifact) == weights_of(expected.artifact)
    # Their digests hold the time of publication, so the contents are compared.
    for step, artifact in kept(workshop).items():
        assert artifact.manifest.is_same_content(kept(whole)[step].manifest)
    assert len(workshop.registry.artifacts()) == len(whole.registry.artifacts()) == 3


def test_a_name_that_another_machine_published_first_stays_as_it_is(workshop: Workshop, tmp_path: Path) -> None:
    recipe = four_epochs(workshop)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.txt").write_text("not bit for bit the same")
    draft = ManifestDraft(
        kind="lora",
        name="colours",
        base_model=BaseModelIdentity(id="tiny-base"),
        lora=LoraShape(rank=4, alpha=8.0, target_modules=["q_proj"]),
        dtype="float32",
    )
    first = workshop.registry.publish(tmp_path / "other", draft, fine_tuned_name=f"{NAME}:ckpt-step-8")
    workshop.run(recipe, fine_tuned_name=NAME)
    assert kept(workshop)[8].digest == first.digest
    assert sorted(kept(workshop)) == [8, 12]


def test_where_a_stage_may_stop_early_the_last_epochs_that_ran_are_kept(workshop: Workshop) -> None:
    """Nothing improves by 100 nats, so the run ends thirteen validations after the first one."""
    stage = workshop.sft(
        epochs=40,
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        evaluate_every_steps=1,
        early_stopping={"patience": 13, "min_improvement": 100},
    )
    result = workshop.run(four_epochs(workshop, stages=[stage]), fine_tuned_name=NAME)
    assert result.steps == 14
    assert list(kept(workshop)) == [8, 12], "the end of the first epoch went when the third was published"
    assert len(workshop.registry.artifacts()) == 3


def test_stages_are_counted_through(workshop: Workshop) -> None:
    write_jsonl(workshop.root / "preferences.jsonl", preference_rows(16))
    preferences = {"kind": "dpo", "data": [{"path": "preferences.jsonl"}], "max_steps": 2, "micro_batch_size": 2}
    stages = [workshop.cpt(epochs=1), workshop.sft(epochs=1), preferences | {"gradient_accumulation_steps": 1}]
    observer = Recorder()
    result = workshop.run(four_epochs(workshop, stages=stages), observer=observer, fine_tuned_name=NAME)
    assert [metrics.run_step for metrics in observer.steps] == list(range(1, result.steps + 1))
    assert {metrics.run_total_steps for metrics in observer.steps} == {result.steps}
    lengths = [sum(metrics.stage == stage for metrics in observer.steps) for stage in ("1-cpt", "2-sft", "3-dpo")]
    assert list(kept(workshop)) == [lengths[0], lengths[0] + lengths[1]]
    first = observer.steps[0]
    pace = first.seconds_left / (result.steps - 1)
    assert math.isfinite(pace)
    assert pace > 0, "all later steps are waited for, not only those of the stage"
    assert observer.steps[-1].seconds_left == 0


@pytest.mark.parametrize(
    "method", [{"kind": "dora", "rank": 4, "extract_lora_rank": 4}, {"kind": "full"}, {"kind": "lora", "rank": 4}]
)
def test_only_methods_whose_adapter_is_trained_itself_have_them(workshop: Workshop, method: dict[str, Any]) -> None:
    stage = workshop.sft(epochs=2, micro_batch_size=8, gradient_accumulation_steps=4)
    workshop.run(four_epochs(workshop, method=method, stages=[stage]), fine_tuned_name=NAME)
    assert len(kept(workshop)) == (1 if method["kind"] == "lora" else 0)


def test_a_run_of_one_epoch_has_only_its_result(workshop: Workshop) -> None:
    workshop.run(four_epochs(workshop, stages=[workshop.sft(epochs=1)]), fine_tuned_name=NAME)
    assert kept(workshop) == {}


def test_processed_tokens_are_all_tokens_of_the_rows_that_were_trained_on(workshop: Workshop, tokenizer: Any) -> None:
    """Counted again with the stock template: every token of every row, once for each epoch."""
    write_jsonl(workshop.root / "chat.jsonl", chat_rows(20))
    stage = workshop.sft(epochs=3, validation=None)
    result = workshop.run(four_epochs(workshop, stages=[stage]))
    rows = [tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"] for row in chat_rows(20)]
    assert result.processed_tokens == result.metrics["processed_tokens"] == 3 * sum(map(len, rows))
    assert 0 < result.trained_tokens < result.processed_tokens


def test_running_text_is_processed_as_it_is_trained(workshop: Workshop) -> None:
    write_jsonl(workshop.root / "text.jsonl", text_rows(10))
    result = workshop.run(four_epochs(workshop, stages=[workshop.cpt(validation=None)]))
    assert result.processed_tokens >= result.trained_tokens > 0
