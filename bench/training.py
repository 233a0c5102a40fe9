"""Capo against TRL's SFTTrainer: the same rows in the same steps, the same adapter and schedule, one after the other.

Each runs in a process of its own, so that peak memory is its own. Both get the same token ids and masks, and TRL gets
the rows of each step in random order, as its own sampler would. Neither packs: a batch counts rows in both.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.training_rows import mixed_length_rows

NUM_ROWS = 640
MICRO_BATCH_SIZE, GRADIENT_ACCUMULATION_STEPS = 8, 2
LEARNING_RATE = 1e-3
WARM_STEPS = 3
"""Left out of the time: first allocations and first use of kernels."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What one trainer did."""

    losses: list[float]
    seconds: float
    """Of all steps but the first few."""
    tokens: int
    """Without padding, of the same steps."""
    peak_bytes: int


def run(repeats: int = 3) -> str:
    """Train with both and give the table in Markdown. Takes minutes.

    The trainers take turns, and each one's median counts: other work on the machine slows both alike.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = mixed_length_rows(NUM_ROWS)
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / "recipe.json").write_text(json.dumps(_recipe()))
        trials: dict[str, list[Trial]] = {"capo": [], "trl": []}
        for _ in range(repeats):
            for trainer, made in trials.items():
                made.append(_in_a_process(trainer, root))
    return _table(trials)


def _recipe() -> dict[str, Any]:
    return {
        "name": "bench",
        "base_model": "capo-tiny",
        "stages": [
            {
                "kind": "sft",
                "data": [{"path": "rows.jsonl"}],
                "epochs": 1,
                "learning_rate": LEARNING_RATE,
                "scheduler": "constant",
                "warmup_steps": 0,
                "micro_batch_size": MICRO_BATCH_SIZE,
                "gradient_accumulation_steps": GRADIENT_ACCUMULATION_STEPS,
            }
        ],
    }


def _in_a_process(trainer: str, root: Path) -> Trial:
    # Each as its users would start it: Capo chooses how its threads wait, TRL takes what OpenMP does by itself.
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-m", "bench.training", trainer, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{trainer} ended with {done.returncode}: {done.stderr[-2000:]}")
    return Trial(**json.loads(done.stdout.splitlines()[-1]))


def _table(trials: dict[str, list[Trial]]) -> str:
    lines = [
        "| trainer | tokens/s | peak memory | mean loss of the last 10 steps | largest difference of a step's loss |",
        "|---|---|---|---|---|",
    ]
    speed = {name: statistics.median(trial.tokens / trial.seconds for trial in made) for name, made in trials.items()}
    memory = {name: statistics.median(trial.peak_bytes for trial in made) for name, made in trials.items()}
    capo, trl = trials["capo"][0].losses, trials["trl"][0].losses
    apart = max(abs(ours - theirs) for ours, theirs in zip(capo, trl, strict=True))
    for name, losses in (("capo", capo), ("trl", trl)):
        lines.append(
            f"| {name} | {speed[name]:,.0f} | {memory[name] / 2**20:,.0f} MiB | {statistics.mean(losses[-10:]):.4f} "
            f"| {apart:.1e} |"
        )
    ratio = f"{speed['capo'] / speed['trl']:.2f} times the tokens/s, {memory['capo'] / memory['trl']:.2f} of the memory"
    return "\n".join([*lines, "", f"Capo against TRL: {ratio}.", ""])


def _train_with(trainer: str, root: Path) -> Trial:
    from tune.threads import prepare_environment

    if trainer == "capo":
        prepare_environment()
    from registry import Registry
    from tune.preparation import prepare
    from tune.progress import SilentObserver
    from tune.recipe_file import load_recipe

    prepared = prepare(load_recipe(root / "recipe.json"), Registry(root / "registry"), root, SilentObserver())
    if trainer == "capo":
        return _train_with_capo(prepared)
    return _train_with_trl(prepared, root)


def _train_with_capo(prepared: Any) -> Trial:
    import time

    from tune.memory import peak_bytes
    from tune.model import load_trainable
    from tune.optimizers import make_optimizer
    from tune.progress import SilentObserver, StepMetrics
    from tune.train import StageState, train_stage

    recipe, (ready,) = prepared.recipe, prepared.stages
    trainable = load_trainable(
        prepared.base.path,
        recipe.method,
        dtype=recipe.dtype,
        device=prepared.device,
        seed=recipe.seed,
        gradient_checkpointing=False,
    )
    losses: list[float] = []
    ends: list[float] = []

    class Clock(SilentObserver):
        def on_step(self, metrics: StepMetrics) -> None:
            losses.append(metrics.train_loss)
            ends.append(time.perf_counter())

    train_stage(
        trainable,
        ready.stage,
        ready.data,
        StageState(make_optimizer(trainable, ready.stage, ready.learning_rate), step=0, trained_tokens=0),
        learning_rate=ready.learning_rate,
        observer=Clock(),
        should_stop=lambda: None,
        save_checkpoint=lambda state: None,
        checkpoint_every_steps=None,
    )
    return Trial(losses, ends[-1] - ends[WARM_STEPS - 1], _timed_tokens(ready), peak_bytes(prepared.device))


def _train_with_trl(prepared: Any, root: Path) -> Trial:
    import time

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from tune.memory import peak_bytes
    from tune.model import load_tokenizer, load_trainable

    recipe, (ready,) = prepared.recipe, prepared.stages
    trainable = load_trainable(
        prepared.base.path,
        recipe.method,
        dtype=recipe.dtype,
        device=prepared.device,
        seed=recipe.seed,
        gradient_checkpointing=False,
    )
    chance = random.Random(1)
    rows = []
    for step in ready.data.steps:
        sequences = [index for micro_batch in step.micro_batches for (index,) in micro_batch]
        chance.shuffle(sequences)
        for index in sequences:
            example = ready.data.examples[index]
            token_ids, trained = example.token_ids.tolist(), example.trained.tolist()
            labels = [token if is_trained else -100 for token, is_trained in zip(token_ids, trained, strict=True)]
            rows.append({"input_ids": token_ids, "labels": labels})
    ends: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **named: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    config = SFTConfig(
        output_dir=str(root / "trl"),
        per_device_train_batch_size=MICRO_BATCH_SIZE,
        gradient_accumulation_steps=GRADIENT_ACCUMULATION_STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        adam_beta2=ready.stage.adam_beta2,
        weight_decay=0.0,
        max_grad_norm=ready.stage.max_grad_norm,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=prepared.device.type == "cpu",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=trainable.model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(prepared.base.path),
        callbacks=[Clock()],
    )
    trainer.train()
    return Trial(losses, ends[-1] - ends[WARM_STEPS - 1], _timed_tokens(ready), peak_bytes(prepared.device))


def _timed_tokens(ready: Any) -> int:
    steps = list(ready.data.steps)[WARM_STEPS:]
    indices = (index for step in steps for micro_batch in step.micro_batches for (index,) in micro_batch)
    return sum(len(ready.data.examples[index].token_ids) for index in indices)


if __name__ == "__main__":
    found = _train_with(sys.argv[1], Path(sys.argv[2]))
    print(json.dumps({name: getattr(found, name) for name in Trial.__slots__}))
