"""Whole runs, recipe to registry: what is published, that other tools load it, and that a stopped run goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from registry import Artifact, Registry, identify, locate_base_model
from registry.errors import InvalidDataError, InvalidRequestError, ModelNotFoundError, StorageError, UnavailableError
from tests.tune.samples import chat_rows, text_rows, write_jsonl
from tests.tune.workshop import Recorder, StopAfter, Workshop, weights_of
from tune import checkpoint, export
from tune.checkpoint import CheckpointFolder
from tune.methods import FullMethod
from tune.model import load_trainable
from tune.progress import StepMetrics, StopRequested
from tune.recipe_file import parse_recipe
from tune.session import TrainingResult, tensorboard_dir


@dataclass(frozen=True)
class Published:
    artifact: Artifact
    observer: Recorder
    result: TrainingResult


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> dict[str, Published]:
    """One adapter and one whole model, trained long enough to have clear answers; read-only."""
    root = tmp_path_factory.mktemp("published")
    write_jsonl(root / "chat.jsonl", chat_rows(80))
    write_jsonl(root / "text.jsonl", text_rows(80))
    workshop = Workshop(root, base_dir, Registry(root / "registry"))
    recipes = {
        "lora": workshop.recipe(stages=[workshop.sft(epochs=6, evaluate_every_steps=20)]),
        "full": workshop.recipe(
            method={"kind": "full"}, stages=[workshop.cpt(), workshop.sft(epochs=4, learning_rate=5e-3)]
        ),
    }
    made = {}
    for kind, recipe in recipes.items():
        observer = Recorder()
        result = workshop.run(recipe, kind, observer, fine_tuned_name=f"ft:tiny-base:acme::{kind}", job_id="ftjob-1")
        made[kind] = Published(result.artifact, observer, result)
    return made


def stock_model(published: Published, base_dir: Path) -> Any:
    """Loaded by stock transformers and PEFT, without a line of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory = published.artifact.path
    if published.artifact.manifest.kind == "merged":
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    return PeftModel.from_pretrained(base, directory).eval()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_stock_libraries_load_the_artifact_and_give_the_same_answers(
    published: dict[str, Published], base_dir: Path, kind: str
) -> None:
    model = stock_model(published[kind], base_dir)
    probes = published[kind].artifact.manifest.probes
    assert probes, "these runs are long enough to have clear answers"
    for probe in probes:
        prompt = torch.tensor([probe.prompt_token_ids])
        made = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(probe.completion_token_ids),
            do_sample=False,
        )
        assert made[0, prompt.shape[1] :].tolist() == probe.completion_token_ids


@pytest.mark.parametrize(("kind", "stage"), [("lora", "1-sft"), ("full", "2-sft")])
def test_the_published_validation_loss_is_that_of_the_published_bytes(
    published: dict[str, Published], base_dir: Path, tokenizer: Any, kind: str, stage: str
) -> None:
    """Recomputed with stock libraries from the held-out rows, found by asking which rows no step trained on."""
    from tune.data.dataset import DatasetReader, held_out_mask

    artifact = published[kind].artifact
    path = artifact.path.parents[3] / "chat.jsonl"
    rows, _ = DatasetReader(tokenizer, kind="sft", max_length=256, over_length="refuse").read(path, shown_as=path)
    model = stock_model(published[kind], base_dir)
    total = count = 0.0
    for index in held_out_mask(rows, 0.2, seed=42).nonzero()[0]:
        (example,) = rows[index].examples
        ids = torch.tensor([example.token_ids.tolist()])
        labels = torch.where(torch.tensor([example.trained.tolist()]), ids, -100)
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * example.num_trained
        count += example.num_trained
    assert artifact.manifest.metrics[f"{stage}.valid_loss"] == pytest.approx(total / count, abs=1e-4)


def test_an_adapter_gives_the_logits_it_gave_while_training(published: dict[str, Published], base_dir: Path) -> None:
    """Weights straight from the file, multiplied by hand: y = W x + alpha / r * B A x (LoRA, section 4.1)."""
    from transformers import AutoModelForCausalLM

    artifact = published["lora"].artifact
    weights = load_file(artifact.path / "adapter_model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in weights:
                parameter += 2.0 * weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
        ids = torch.tensor([artifact.manifest.probes[0].prompt_token_ids])
        by_peft = stock_model(published["lora"], base_dir)(ids).logits
        assert torch.allclose(merged(ids).logits, by_peft, atol=1e-5)


def test_the_adapter_directory_is_what_peft_and_vllm_expect_and_no_more(published: dict[str, Published]) -> None:
    artifact = published["lora"].artifact
    assert set(artifact.manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((artifact.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-base"
    assert (config["r"], config["lora_alpha"], config["bias"], config["use_dora"]) == (16, 32, "none", False)
    assert not config["modules_to_save"]
    shape = artifact.manifest.lora
    assert shape is not None
    assert (shape.rank, shape.alpha, sorted(config["target_modules"])) == (16, 32, sorted(shape.target_modules))
    tensors = load_file(artifact.path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert artifact.manifest.dtype == "float32"


def test_a_whole_model_is_stored_in_bfloat16_with_the_tokenizer_files_of_its_base(
    published: dict[str, Published], base_dir: Path
) -> None:
    artifact = published["full"].artifact
    assert {tensor.dtype for tensor in load_file(artifact.path / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((artifact.path / "config.json").read_text())
    assert (config["dtype"], config["use_cache"]) == ("bfloat16", True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (artifact.path / name).read_bytes() == (base_dir / name).read_bytes()


def test_a_whole_model_keeps_its_bases_tokenizer_of_whatever_kind(tmp_path: Path, base_dir: Path) -> None:
    base, directory = tmp_path / "base", tmp_path / "model"
    shutil.copytree(base_dir, base)
    for name in ("vocab.txt", "spiece.model"):
        (base / name).write_text("as BERT and T5 keep it")
    directory.mkdir()
    trainable = load_trainable(
        base, FullMethod(), dtype="float32", device=torch.device("cpu"), seed=1, gradient_checkpointing=False
    )
    export.export_model(trainable, base, directory, save_dtype="bfloat16")
    assert (directory / "vocab.txt").read_text() == "as BERT and T5 keep it"
    assert identify("model", directory).tokenizer_digest == identify("base", base).tokenizer_digest


def test_the_manifest_tells_how_the_artifact_came_to_be(published: dict[str, Published]) -> None:
    manifest = published["lora"].artifact.manifest
    assert (manifest.kind, manifest.name, manifest.seed, manifest.job_id) == ("lora", "colours", 42, "ftjob-1")
    assert manifest.base_model.id == "tiny-base"
    assert [(record.path, record.rows_used) for record in manifest.data] == [("chat.jsonl", 80)]
    assert {"torch", "transformers", "peft", "python"} <= manifest.library_versions.keys()
    assert manifest.recipe is not None
    resolved: Any = manifest.recipe["stages"]
    assert resolved[0]["max_length"] == 256
    assert resolved[0]["micro_batch_size"] == 2
    assert manifest.recipe["dtype"] == "float32"
    assert manifest.metrics["1-sft.valid_loss"] < manifest.metrics["1-sft.base_valid_loss"]
    steps = published["lora"].observer.steps
    assert manifest.metrics["trained_tokens"] == published["lora"].result.trained_tokens == steps[-1].trained_tokens
    assert published["lora"].result.steps == len(steps) == steps[-1].step == steps[-1].total_steps


def test_a_resolved_recipe_can_be_run_again(published: dict[str, Published]) -> None:
    recipe = published["full"].artifact.manifest.recipe
    assert parse_recipe(recipe).model_dump(mode="json") == recipe


def test_validation_comes_when_asked_and_after_the_last_step(published: dict[str, Published]) -> None:
    steps = published["lora"].observer.steps
    evaluated = [metrics.step for metrics in steps if metrics.valid_loss is not None]
    assert evaluated == [*range(20, len(steps), 20), len(steps)]


def test_an_artifact_verifies_and_answers_to_its_fine_tuned_name(published: dict[str, Published]) -> None:
    artifact = published["full"].artifact
    registry = Registry(artifact.path.parents[2])
    assert registry.resolve("ft:tiny-base:acme::full").digest == artifact.digest
    assert registry.verify(artifact.revision) == []


def test_tensorboard_files_hold_every_step(published: dict[str, Published]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root = published["lora"].artifact.path.parents[3]
    log = EventAccumulator(str(tensorboard_dir(root / "lora")))
    log.Reload()
    losses = [event.value for event in log.Scalars("1-sft/train_loss")]
    assert losses == pytest.approx([metrics.train_loss for metrics in published["lora"].observer.steps])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(workshop: Workshop, dropout: float) -> None:
    recipe = workshop.recipe(
        method={"kind": "lora", "dropout": dropout}, stages=[workshop.sft(max_steps=4, epochs=None)]
    )
    first = workshop.run(recipe, "a")
    again = workshop.run(recipe, "b")
    other = workshop.run(recipe | {"seed": 43}, "c")
    assert weights_of(first.artifact) == weights_of(again.artifact)
    assert weights_of(first.artifact) != weights_of(other.artifact)


@pytest.mark.parametrize("stop_after", [1, 4, 8, 11])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(workshop: Workshop, method: str, stop_after: int) -> None:
    """Two stages of 8 and 8 steps, with dropout, stopped inside the first, between them, and inside the second."""
    given = {"kind": "lora", "dropout": 0.1} if method == "lora" else {"kind": "full"}
    stage = {"epochs": None, "max_steps": 8, "micro_batch_size": 2}
    recipe = workshop.recipe(method=given, stages=[workshop.cpt(**stage), workshop.sft(**stage)])
    whole = Recorder()
    expected = workshop.run(recipe, "whole", whole)
    first, second = Recorder(), Recorder()
    with pytest.raises(StopRequested, match="paused"):
        workshop.run(recipe, "broken", first, StopAfter(stop_after))
    result = workshop.run(recipe, "broken", second)
    assert second.said("resuming at stage")
    assert len(first.steps) == stop_after
    joined = [(m.stage, m.step, m.train_loss, m.trained_tokens) for m in first.steps + second.steps]
    assert joined == [(m.stage, m.step, m.train_loss, m.trained_tokens) for m in whole.steps]
    assert weights_of(result.artifact) == weights_of(expected.artifact)
    assert result.metrics == expected.metrics
    assert not list((workshop.root / "broken" / "checkpoints").iterdir())


def test_a_crashed_run_goes_on_from_its_last_checkpoint(workshop: Workshop) -> None:
    recipe = workshop.recipe(checkpoint_every_steps=3, stages=[workshop.sft(max_steps=8, epochs=None)])
    expected = workshop.run(recipe, "whole")

    class Crash(Recorder):
        def on_step(self, metrics: StepMetrics) -> None:
            if metrics.step == 8:
                raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError):
        workshop.run(recipe, "broken", Crash())
    observer = Recorder()
    result = workshop.run(recipe, "broken", observer)
    assert [metrics.step for metrics in observer.steps] == [7, 8]
    assert weights_of(result.artifact) == weights_of(expected.artifact)


def test_a_half_written_checkpoint_is_not_used(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = workshop.recipe(checkpoint_every_steps=2, stages=[workshop.sft(max_steps=6, epochs=None)])
    saved = []
    save = checkpoint.save_file

    def full_disk(tensors: dict[str, torch.Tensor], path: Path) -> None:
        saved.append(path)
        if len(saved) == 4:  # two files for each checkpoint
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(StorageError, match=r"cannot write the checkpoint.*free some space"):
        workshop.run(recipe)
    observer = Recorder()
    workshop.run(recipe, observer=observer)
    assert [metrics.step for metrics in observer.steps] == [3, 4, 5, 6]


@pytest.mark.parametrize("change", ["recipe", "data"])
def test_a_checkpoint_of_another_run_is_not_continued(workshop: Workshop, change: str) -> None:
    recipe = workshop.recipe()
    with pytest.raises(StopRequested):
        workshop.run(recipe, should_stop=StopAfter(2))
    if change == "recipe":
        recipe["seed"] = 7
    else:
        write_jsonl(workshop.root / "chat.jsonl", chat_rows(48))
    observer = Recorder()
    workshop.run(recipe, observer=observer)
    assert observer.said("held a checkpoint of another recipe or other data")
    assert observer.steps[0].step == 1


def test_a_checkpoint_folder_keeps_the_newest_only(workshop: Workshop) -> None:
    recipe = workshop.recipe(checkpoint_every_steps=1)
    with pytest.raises(StopRequested):
        workshop.run(recipe, should_stop=StopAfter(5))
    (kept,) = (workshop.root / "work" / "checkpoints").iterdir()
    assert kept.name == "checkpoint-00-00000005"
    assert CheckpointFolder(kept.parent, "another").latest() is None


def test_an_adapter_of_a_bfloat16_recipe_is_stored_in_bfloat16(workshop: Workshop) -> None:
    stages = [workshop.sft(max_steps=3, epochs=None)]
    artifact = workshop.run(workshop.recipe(dtype="bfloat16", stages=stages)).artifact
    tensors = load_file(artifact.path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert artifact.manifest.dtype == "bfloat16"


def test_a_published_model_is_a_base_for_the_next_run_and_becomes_its_parent(workshop: Workshop) -> None:
    stages = [workshop.sft(max_steps=2, epochs=None)]
    base = workshop.run(workshop.recipe(name="little", method={"kind": "full"}, stages=stages)).artifact
    child = workshop.run(workshop.recipe(base_model=base.revision, stages=stages)).artifact
    assert child.manifest.base_model.id == base.revision
    assert child.manifest.parents == [base.revision]


def test_the_alias_points_to_the_result(workshop: Workshop) -> None:
    stages = [workshop.sft(max_steps=1, epochs=None)]
    artifact = workshop.run(workshop.recipe(promote_alias="live", stages=stages)).artifact
    assert workshop.registry.resolve("live").revision == artifact.revision
    with pytest.raises(InvalidRequestError, match="alias='other' and the recipe's promote_alias='live' differ"):
        workshop.run(workshop.recipe(promote_alias="live", stages=stages), alias="other")


def test_validation_rows_that_are_training_rows_are_reported(workshop: Workshop) -> None:
    write_jsonl(workshop.root / "held.jsonl", chat_rows(42)[38:])
    observer = Recorder()
    stages = [workshop.sft(validation={"path": "held.jsonl"}, max_steps=1, epochs=None)]
    artifact = workshop.run(workshop.recipe(stages=stages), observer=observer).artifact
    assert observer.said("2 of 4 validation rows are also training rows")
    assert [record.path for record in artifact.manifest.data] == ["chat.jsonl", "held.jsonl"]


def test_a_faulty_row_stops_the_run_before_training_and_names_file_and_line(workshop: Workshop) -> None:
    write_jsonl(workshop.root / "text.jsonl", [*text_rows(3), {"txt": "x"}])
    observer = Recorder()
    with pytest.raises(InvalidDataError, match=r"^text.jsonl: line 4: unknown key 'txt'") as caught:
        workshop.run(workshop.recipe(stages=[workshop.sft(), workshop.cpt()]), observer=observer)
    assert caught.value.line == 4
    assert not observer.steps
    assert workshop.registry.artifacts() == []


def test_an_unknown_base_is_refused(workshop: Workshop) -> None:
    with pytest.raises(ModelNotFoundError):
        workshop.run(workshop.recipe(base_model="nobody@0123456789abcdef"))


def test_broken_epochs_and_many_epochs_count_as_they_say(workshop: Workshop) -> None:
    stage = {"validation": None, "micro_batch_size": 4, "gradient_accumulation_steps": 1}
    for epochs, steps in ((1.0, 10), (0.5, 5), (2.25, 23)):
        observer = Recorder()
        recipe = workshop.recipe(stages=[workshop.sft(epochs=epochs, **stage)])
        with pytest.raises(StopRequested):
            workshop.run(recipe, f"{epochs}", observer, StopAfter(1))
        assert observer.steps[0].total_steps == steps


def test_two_runs_cannot_share_a_work_dir(workshop: Workshop) -> None:
    def meanwhile() -> str | None:
        with pytest.raises(UnavailableError, match="another run works in"):
            workshop.run(workshop.recipe())
        return "enough"

    with pytest.raises(StopRequested):
        workshop.run(workshop.recipe(), should_stop=meanwhile)


def test_a_turn_that_serving_would_not_end_is_reported(workshop: Workshop, tmp_path: Path) -> None:
    base = tmp_path / "endless"
    shutil.copytree(workshop.base_dir, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    observer = Recorder()
    stages = [workshop.sft(max_steps=1, epochs=None)]
    workshop.run(workshop.recipe(base_model=str(base), stages=stages), observer=observer)
    assert observer.said("answers end with ['<|im_end|>'], but serving stops only at ['<|endoftext|>']")


def test_a_quantised_base_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    base = tmp_path / "quantised"
    shutil.copytree(workshop.base_dir, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(InvalidRequestError, match="quantised and cannot be trained"):
        workshop.run(workshop.recipe(base_model=str(base)))


def test_the_registry_takes_the_adapter_as_it_would_a_strangers(
    published: dict[str, Published], base_dir: Path, tmp_path: Path
) -> None:
    artifact = published["lora"].artifact
    registry = Registry(tmp_path / "registry")
    (tmp_path / "adapter").mkdir()
    for name in artifact.manifest.files:
        shutil.copyfile(artifact.path / name, tmp_path / "adapter" / name)
    base = locate_base_model(str(base_dir), registry)
    imported = registry.import_adapter(tmp_path / "adapter", name="stranger", base_model=base)
    assert imported.manifest.lora == artifact.manifest.lora


def test_a_full_disk_at_the_end_publishes_nothing_and_no_step_is_trained_twice(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = workshop.recipe(stages=[workshop.sft(max_steps=4, epochs=None)])
    expected = workshop.run(recipe, "whole")

    def full_disk(*given: Any, **named: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(export, "save_file", full_disk)
        with pytest.raises(StorageError, match="cannot write the trained weights"):
            workshop.run(recipe)
    assert len(workshop.registry.artifacts()) == 1
    observer = Recorder()
    result = workshop.run(recipe, observer=observer)
    assert observer.said("resuming after the last step")
    assert not observer.steps
    assert weights_of(result.artifact) == weights_of(expected.artifact)
    assert result.metrics == expected.metrics
