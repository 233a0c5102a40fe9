"""Our losses against TRL's own trainers: same token ids, masks, order, first weights, optimizer and schedule.

TRL gets rows that are tokenised already, in the order in which our plan visits them, so that what is compared is the
training and not the data. 10 steps each; 50 with CAPO_LONG=1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import locate_base_model
from tests.sizes import size
from tests.tune.plans import plan_steps
from tests.tune.samples import write_jsonl
from tune.data.batches import StepPlan, plan_epoch
from tune.data.dataset import DatasetReader
from tune.data.mask import Example
from tune.data.pairs import Pairs
from tune.dpo import PreferenceObjective, Reference
from tune.methods import FullMethod, LoraMethod, Method, QloraMethod
from tune.model import Trainable, load_tokenizer, load_trainable
from tune.objectives import LanguageModelling
from tune.optimizers import make_optimizer
from tune.progress import SilentObserver, StepMetrics
from tune.recipe import Dpo, Stage
from tune.train import StageData, StageState, train_stage

pytestmark = pytest.mark.training

STEPS = size(10, 50)
MICRO, ACCUMULATION = 2, 2
PER_STEP = MICRO * ACCUMULATION


@pytest.fixture(scope="module")
def capo_tiny() -> Path:
    return locate_base_model("capo-tiny").path


@pytest.fixture(scope="module")
def rows(capo_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Example]]:
    """Chats, texts and preferences out of the example tasks, as Capo tokenises them."""
    from examples.tasks.generate import TASKS

    pairs = TASKS["support"]().train[: STEPS * PER_STEP]
    chats = [{"messages": _chat(pair.message, pair.answer)} for pair in pairs]
    texts = [{"text": f"{pair.message} {pair.answer}"} for pair in pairs]
    preferences = [
        {"prompt": pair.message, "chosen": pair.answer, "rejected": f"I do not know. {other.message}"}
        for pair, other in zip(pairs, reversed(pairs), strict=True)
    ]
    directory = tmp_path_factory.mktemp("rows")
    tokenizer = load_tokenizer(capo_tiny)
    read: dict[str, list[Example]] = {}
    for kind, given in (("sft", chats), ("cpt", texts), ("dpo", preferences)):
        path = write_jsonl(directory / f"{kind}.jsonl", given)
        reader = DatasetReader(tokenizer, kind=kind, max_length=256, over_length="refuse")
        stored, _ = reader.read(path, shown_as=path)
        read[kind] = [example for row in stored for example in row.examples]
    return read


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Recorder(SilentObserver):
    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)


def load(base_dir: Path, method: Method) -> Trainable:
    return load_trainable(
        base_dir, method, dtype="float32", device=torch.device("cpu"), seed=1, gradient_checkpointing=False
    )


def plan_of(lengths: Sequence[int]) -> Sequence[StepPlan]:
    order = plan_epoch([0] * len(lengths), [1.0], lengths, pack_tokens=None, seed=3, epoch=0)
    return plan_steps([order], micro_batch_size=MICRO, gradient_accumulation_steps=ACCUMULATION, lengths=lengths)


def our_losses(trainable: Trainable, kind: str, examples: Sequence[Any], steps: Sequence[StepPlan], rate: float) -> Any:
    stage = Stage.model_validate(
        {"kind": kind, "data": [{"path": "x"}], "scheduler": "constant", "warmup_steps": 0, "max_grad_norm": 1.0}
        | {"micro_batch_size": MICRO, "gradient_accumulation_steps": ACCUMULATION}
    )
    make_objective: Any = LanguageModelling
    if kind == "dpo":
        reference = Reference()
        reference.measure(trainable, examples, MICRO)

        def make_objective(pairs: Any) -> PreferenceObjective:
            return PreferenceObjective(pairs, Dpo(), reference)

    recorder = Recorder()
    train_stage(
        trainable,
        stage,
        StageData(kind, examples, steps, [], make_objective=make_objective),
        StageState(make_optimizer(trainable, stage, rate), step=0, trained_tokens=0, micro_batch_size=MICRO),
        learning_rate=rate,
        observer=recorder,
        should_stop=lambda: None,
        save_checkpoint=lambda state: None,
        checkpoint_every_steps=None,
    )
    return recorder.steps


def keep_first_weights(model: Any, ours: Trainable) -> None:
    """Those of ours, in float32: TRL rounds the adapter of a 4-bit base to bfloat16, in which small steps are lost."""
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.parameters():
            theirs[name].data = parameter.detach().clone()


def trl_history(
    kind: str,
    model: Any,
    rows: list[dict[str, Any]],
    ours: Trainable,
    *,
    rate: float,
    directory: Path,
    base: Path,
) -> Any:
    """TRL's own trainer over ``rows`` in their order; its log, one entry for each optimizer step."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    options: dict[str, Any] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": None,
        "seed": 1,
    }
    tokenizer = load_tokenizer(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about themselves
        if kind == "dpo":

            class TokenisedRows(DPOTrainer):
                """It tokenises everything it gets; these rows are tokenised."""

                def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                    return dataset

            trainer: Any = TokenisedRows(
                model=model,
                args=DPOConfig(**options, beta=0.1),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        else:
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(**options),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        keep_first_weights(trainer.model, ours)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def stock_model(base: Path, method: Method) -> Any:
    """Made by transformers and PEFT alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32}
    if isinstance(method, QloraMethod):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    if isinstance(method, FullMethod):
        return model
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))


def in_order(steps: Sequence[StepPlan]) -> Iterator[int]:
    for step in steps:
        for micro in step.micro_batches:
            for (index,) in micro:
                yield index


def trl_row(example: Example) -> dict[str, list[int]]:
    labels = [int(i) if trained else -100 for i, trained in zip(example.token_ids, example.trained, strict=True)]
    return {"input_ids": example.token_ids.tolist(), "labels": labels}


LORA = LoraMethod(rank=8)
CASES = [
    ("sft", LORA, 2e-3, 1e-3),
    ("cpt", LORA, 2e-3, 1e-3),
    ("sft", FullMethod(), 3e-4, 1e-3),
    ("sft", QloraMethod(rank=8), 2e-3, 2e-2),
]


@pytest.mark.parametrize(
    ("kind", "method", "rate", "tolerance"), CASES, ids=lambda given: getattr(given, "kind", given)
)
def test_the_loss_of_every_step_is_that_of_trls_trainer(
    rows: dict[str, list[Example]],
    capo_tiny: Path,
    tmp_path: Path,
    kind: str,
    method: Method,
    rate: float,
    tolerance: float,
) -> None:
    examples = rows[kind]
    steps = plan_of([len(example.token_ids) for example in examples])
    ours = load(capo_tiny, method)
    stock = stock_model(capo_tiny, method)
    given = [trl_row(examples[i]) for i in in_order(steps)]
    theirs = trl_history(kind, stock, given, ours, rate=rate, directory=tmp_path, base=capo_tiny)
    mine = our_losses(ours, kind, examples, steps, rate)
    assert len(mine) == len(theirs) == STEPS
    assert mine[-1].train_loss < 0.9 * mine[0].train_loss, "it learns, so equal losses say something"
    assert [m.train_loss for m in mine] == pytest.approx([entry["loss"] for entry in theirs], abs=tolerance)


def test_loss_and_rewards_of_every_dpo_step_are_those_of_trls_trainer(
    rows: dict[str, list[Example]], capo_tiny: Path, tmp_path: Path
) -> None:
    pairs = Pairs(rows["dpo"])
    steps = plan_of([len(pair.chosen.token_ids) + len(pair.rejected.token_ids) for pair in pairs])
    ours = load(capo_tiny, LORA)
    stock = stock_model(capo_tiny, LORA)
    given = []
    for index in in_order(steps):
        pair = pairs[index]
        prompt = pair.prompt_token_ids.tolist()
        sides = {
            name: side.token_ids[len(prompt) :][side.trained[len(prompt) :]].tolist()
            for name, side in (("chosen_ids", pair.chosen), ("rejected_ids", pair.rejected))
        }
        given.append({"prompt_ids": prompt} | sides)
    theirs = trl_history("dpo", stock, given, ours, rate=1e-3, directory=tmp_path, base=capo_tiny)
    mine = our_losses(ours, "dpo", pairs, steps, 1e-3)
    assert len(mine) == len(theirs) == STEPS
    assert mine[-1].train_loss < 0.6, "it learns, so equal losses say something"
    assert [m.train_loss for m in mine] == pytest.approx([entry["loss"] for entry in theirs], abs=1e-3)
    for name in ("rewards/margins", "rewards/chosen", "rewards/accuracies"):
        # In the first step all rewards are zero but for rounding, so which of two is larger means nothing.
        got, expected = [m.figures[name] for m in mine[1:]], [entry[name] for entry in theirs[1:]]
        assert got == pytest.approx(expected, abs=5e-3), name
