"""How a run behaves when something goes wrong or stops getting better: memory, NaN, patience, the best weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from registry.errors import InvalidRequestError
from tests.tune.samples import chat_rows, write_jsonl
from tests.tune.workshop import Recorder, StopAfter, Workshop, weights_of
from tune import objectives
from tune.data.batches import Pack
from tune.forward import Batch
from tune.memory import is_out_of_memory
from tune.model import Trainable
from tune.objectives import LanguageModelling, Losses
from tune.progress import StopRequested, TrainingDivergedError, TrainingOutOfMemoryError
from tune.step import seed_step

CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
)


class ShortMemory:
    """Stands before the forward pass: fails when more than ``most`` sequences come at once, from call ``since`` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception, most: int, since: int = 0) -> None:
        self.orders: list[tuple[tuple[int, ...], ...]] = []
        calls = 0
        plain = LanguageModelling.losses

        def losses(objective: LanguageModelling, trainable: Trainable, sequences: Sequence[Pack]) -> Losses:
            nonlocal calls
            calls += 1
            if calls > since and len(sequences) > most:
                raise error
            if trainable.model.training:
                self.orders.append(tuple(sequences))
            return plain(objective, trainable, sequences)

        monkeypatch.setattr(LanguageModelling, "losses", losses)

    def order(self) -> list[int]:
        return [index for sequences in self.orders for sequence in sequences for index in sequence]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_WORDS)], ids=str)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, error: Exception, method: str
) -> None:
    """From the fifth forward pass on only two sequences fit; the plan has eight at once."""
    stage = workshop.sft(epochs=None, max_steps=8, micro_batch_size=8, gradient_accumulation_steps=1, validation=None)
    recipe = workshop.recipe(method={"kind": method}, stages=[stage])
    with monkeypatch.context() as patched:
        roomy = ShortMemory(patched, error, most=8)
        whole = Recorder()
        workshop.run(recipe, "whole", whole)
    with monkeypatch.context() as patched:
        short = ShortMemory(patched, error, most=2, since=4)
        observer = Recorder()
        result = workshop.run(recipe, "short", observer)
    assert short.order() == roomy.order(), "the same sequences in the same order"
    assert max(len(sequences) for sequences in short.orders[4:]) == 2
    assert [m.train_loss for m in observer.steps] == pytest.approx([m.train_loss for m in whole.steps], abs=1e-5)
    assert [m.trained_tokens for m in observer.steps] == [m.trained_tokens for m in whole.steps]
    assert [m.step for m in observer.steps] == list(range(1, 9)), "no step is skipped or done twice"
    assert observer.said("stage 1-sft step 5: out of memory with micro batches of 8; going on at the same step with 4")
    assert observer.said("stage 1-sft step 5: out of memory with micro batches of 4; going on at the same step with 2")
    assert result.artifact.manifest.metrics["1-sft.micro_batch_size_after_out_of_memory"] == 2.0


def test_a_resumed_run_remembers_what_fitted(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = workshop.sft(epochs=None, max_steps=6, micro_batch_size=4, gradient_accumulation_steps=1, validation=None)
    ShortMemory(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), most=2)
    with pytest.raises(StopRequested):
        workshop.run(workshop.recipe(stages=[stage]), should_stop=StopAfter(3))
    observer = Recorder()
    workshop.run(workshop.recipe(stages=[stage]), observer=observer)
    assert not observer.said("out of memory")
    assert [metrics.step for metrics in observer.steps] == [4, 5, 6]


def test_a_single_sequence_that_does_not_fit_ends_the_run_with_advice(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    ShortMemory(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), most=0)
    with pytest.raises(TrainingOutOfMemoryError, match=r"step 1: out of memory with one sequence.*lower max_length"):
        workshop.run(workshop.recipe(stages=[workshop.sft(validation=None)]))


def test_validation_takes_smaller_batches_where_memory_runs_out(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = workshop.recipe(stages=[workshop.sft(epochs=None, max_steps=1, micro_batch_size=8)])
    expected = workshop.run(recipe, "whole").metrics["1-sft.base_valid_loss"]
    ShortMemory(monkeypatch, RuntimeError(CPU_WORDS), most=3)
    assert workshop.run(recipe, "short").metrics["1-sft.base_valid_loss"] == pytest.approx(expected, abs=1e-6)


def test_only_a_lack_of_memory_counts_as_one() -> None:
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError("can't allocate memory"))


def poison(monkeypatch: pytest.MonkeyPatch, token_id: int) -> None:
    """Every forward pass over a batch that holds the token gives NaN."""
    plain = objectives.token_losses

    def losses(trainable: Trainable, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        losses, hits = plain(trainable, batch)
        return (losses * math.nan if bool((batch.token_ids == token_id).any()) else losses), hits

    monkeypatch.setattr(objectives, "token_losses", losses)


def test_nan_stops_the_job_and_names_step_file_and_lines(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    rows = chat_rows(16)
    rows[10]["messages"][0]["content"] = "[INST]"
    write_jsonl(workshop.root / "chat.jsonl", rows)
    poison(monkeypatch, tokenizer.convert_tokens_to_ids("[INST]"))
    stage = workshop.sft(epochs=1, micro_batch_size=1, gradient_accumulation_steps=4, validation=None)
    with pytest.raises(TrainingDivergedError, match=r"1-sft step \d: loss nan.*\(chat\.jsonl:11\), lower") as caught:
        workshop.run(workshop.recipe(stages=[stage]))
    assert caught.value.code == "training_diverged"
    assert workshop.registry.artifacts() == []


def overfitting(workshop: Workshop, **changes: Any) -> dict[str, Any]:
    """A stage whose validation rows say the opposite of its training rows, so that they get worse and worse."""
    rows = chat_rows(24)
    write_jsonl(workshop.root / "chat.jsonl", rows[:16])
    for row in rows[16:]:
        row["messages"][1]["content"] = "zebra " * 5
    write_jsonl(workshop.root / "held.jsonl", rows[16:])
    stage = workshop.sft(
        validation={"path": "held.jsonl"},
        epochs=None,
        max_steps=40,
        micro_batch_size=8,
        gradient_accumulation_steps=1,
        evaluate_every_steps=2,
        scheduler="constant",
        warmup_steps=0,
    )
    return workshop.recipe(stages=[stage | changes])


def test_early_stopping_ends_a_stage_and_its_best_weights_are_published(workshop: Workshop) -> None:
    observer = Recorder()
    result = workshop.run(overfitting(workshop, early_stopping={"patience": 3}), observer=observer)
    losses = {m.step: m.valid_loss for m in observer.steps if m.valid_loss is not None}
    best = min(losses, key=lambda step: losses[step])
    assert list(losses)[-1] == best + 6 < 40, "three validations without gain, two steps apart"
    assert result.steps == best + 6
    assert result.metrics["1-sft.best_step"] == best
    assert result.metrics["1-sft.valid_loss"] == pytest.approx(losses[best], abs=1e-6)
    assert observer.said(f"stopped early after step {best + 6}, 3 validations without gain")
    assert observer.said(f"took the weights of step {best}")


def test_the_last_weights_are_published_where_the_recipe_says_so(workshop: Workshop) -> None:
    observer = Recorder()
    recipe = overfitting(workshop, early_stopping={"patience": 2}, final_weights="last")
    result = workshop.run(recipe, observer=observer)
    assert result.metrics["1-sft.valid_loss"] == pytest.approx(observer.steps[-1].valid_loss, abs=1e-6)
    assert "1-sft.best_step" not in result.metrics


def test_gains_smaller_than_min_improvement_do_not_count(workshop: Workshop) -> None:
    recipe = overfitting(workshop, early_stopping={"patience": 2, "min_improvement": 50.0})
    assert workshop.run(recipe).steps == 6, "the first validation is the best, two more are not 50 nats better"


@pytest.mark.parametrize("stop_after", [1, 5, 9, 13])
def test_best_weights_and_patience_survive_a_stop(workshop: Workshop, stop_after: int) -> None:
    recipe = overfitting(workshop, early_stopping={"patience": 5})
    whole = Recorder()
    expected = workshop.run(recipe, "whole", whole)
    assert expected.steps > 13
    with pytest.raises(StopRequested):
        workshop.run(recipe, "broken", should_stop=StopAfter(stop_after))
    result = workshop.run(recipe, "broken")
    assert weights_of(result.artifact) == weights_of(expected.artifact)
    assert result.metrics == expected.metrics


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_every_optimizer_goes_on_from_a_checkpoint_as_if_nothing_had_happened(
    workshop: Workshop, optimizer: str
) -> None:
    """Embeddings of 512 x 64 are large enough for bitsandbytes to keep their states in 8 bits."""
    eight_bit = optimizer == "adamw_8bit"
    stage = workshop.sft(epochs=None, max_steps=8, optimizer=optimizer, neftune_alpha=5, learning_rate=3e-3)
    recipe = workshop.recipe(method={"kind": "full"}, stages=[stage])
    expected = workshop.run(recipe, "whole")
    with pytest.raises(StopRequested):
        workshop.run(recipe, "broken", should_stop=StopAfter(4))
    (checkpoint,) = (workshop.root / "broken" / "checkpoints").iterdir()
    dtypes = {tensor.dtype for tensor in load_file(checkpoint / "state.safetensors").values()}
    assert (torch.uint8 in dtypes) == eight_bit
    assert weights_of(workshop.run(recipe, "broken").artifact) == weights_of(expected.artifact)
    assert expected.metrics["1-sft.valid_loss"] < expected.metrics["1-sft.base_valid_loss"] - 0.1


def test_an_optimizer_with_eight_bit_states_learns_alike(workshop: Workshop) -> None:
    ends = {}
    for optimizer in ("adamw", "adamw_8bit"):
        stage = workshop.sft(epochs=None, max_steps=30, optimizer=optimizer, learning_rate=3e-3)
        result = workshop.run(workshop.recipe(method={"kind": "full"}, stages=[stage]), optimizer)
        ends[optimizer] = result.metrics["1-sft.valid_loss"]
    assert ends["adamw_8bit"] == pytest.approx(ends["adamw"], rel=0.05)


def test_neftune_adds_uniform_noise_of_the_papers_size_in_training_only(base_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tune.neftune import noisy_embeddings

    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).train()
    embed = model.get_input_embeddings()
    ids = torch.zeros(4, 50, dtype=torch.int64)
    plain = embed(ids)
    with noisy_embeddings(model, 5.0):
        noise = embed(ids) - plain
        model.eval()
        assert torch.equal(embed(ids), plain)
        model.train()
    assert torch.equal(embed(ids), plain)
    bound = 5.0 / math.sqrt(50 * 64)
    assert bound * 0.99 < float(noise.detach().abs().max()) <= bound
    assert float(noise.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02), "of a uniform distribution"


def test_random_numbers_of_a_step_depend_on_seed_step_and_process_alone() -> None:
    draws = {}
    for key in [(1, 2, 0), (1, 3, 0), (2, 2, 0), (1, 2, 1)]:
        seed_step(*key)
        draws[key] = float(torch.rand(1))
    assert len(set(draws.values())) == 4
    seed_step(1, 2, 0)
    assert float(torch.rand(1)) == draws[1, 2, 0]


def test_float16_is_refused_on_a_cpu_with_the_reason(workshop: Workshop) -> None:
    with pytest.raises(InvalidRequestError, match=r"float16.*GPU.*bfloat16"):
        workshop.run(workshop.recipe(dtype="float16"))


def damage(checkpoint: Path, how: str) -> None:
    weights = checkpoint / "weights.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "flipped":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif how == "missing file":
        (checkpoint / "state.safetensors").unlink()
    elif how == "no record":
        (checkpoint / "checkpoint.json").unlink()
    else:
        record = checkpoint / "checkpoint.json"
        record.write_text(record.read_text()[:-20])


@pytest.mark.parametrize("how", ["cut", "flipped", "missing file", "no record", "torn record"])
def test_a_damaged_checkpoint_is_never_read(workshop: Workshop, how: str) -> None:
    recipe = workshop.recipe(stages=[workshop.sft(epochs=None, max_steps=4)])
    expected = workshop.run(recipe, "whole")
    with pytest.raises(StopRequested):
        workshop.run(recipe, should_stop=StopAfter(2))
    (checkpoint,) = (workshop.root / "work" / "checkpoints").iterdir()
    damage(checkpoint, how)
    observer = Recorder()
    result = workshop.run(recipe, observer=observer)
    assert observer.said("or a damaged one; it was removed and training starts over")
    assert [metrics.step for metrics in observer.steps] == [1, 2, 3, 4]
    assert weights_of(result.artifact) == weights_of(expected.artifact)


def test_a_checkpoint_holds_tensors_and_json_only(workshop: Workshop) -> None:
    with pytest.raises(StopRequested):
        workshop.run(workshop.recipe(), should_stop=StopAfter(2))
    (checkpoint,) = (workshop.root / "work" / "checkpoints").iterdir()
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {"weights.safetensors", "state.safetensors", "checkpoint.json"}
    assert set(json.loads((checkpoint / "checkpoint.json").read_text())["files"]) == names - {"checkpoint.json"}
