"""The training loop against independent implementations: transformers' own loss, plain AdamW, unpacked rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tune.plans import plan_steps
from tests.tune.samples import chat_rows, message, text_rows, write_jsonl
from tune.data.batches import StepPlan, plan_epoch
from tune.data.dataset import DatasetReader
from tune.data.mask import Example
from tune.data.packing import pack_best_fit
from tune.forward import NOT_TRAINED, collate, token_losses
from tune.methods import FullMethod, LoraMethod
from tune.model import Trainable, load_trainable
from tune.optimizers import make_optimizer
from tune.progress import SilentObserver, StepMetrics, StopRequested, TrainingDivergedError
from tune.recipe import Stage
from tune.schedules import learning_rate_share
from tune.train import StageData, StageState, evaluate, train_stage

CPU = torch.device("cpu")


class Recorder(SilentObserver):
    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)


def load(base_dir: Path, method: LoraMethod | FullMethod, **changes: Any) -> Trainable:
    options = {"dtype": "float32", "device": CPU, "seed": 1, "gradient_checkpointing": False} | changes
    return load_trainable(base_dir, method, **options)


def stage_of(**changes: Any) -> Stage:
    base = {"kind": "sft", "data": [{"path": "x"}], "scheduler": "constant", "warmup_share": 0.0}
    return Stage.model_validate(base | changes)


@pytest.fixture(scope="module")
def examples(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """24 chat rows of different lengths."""
    rows = chat_rows(24)
    for index, row in enumerate(rows):
        row["messages"].insert(0, message("system", "Short. " * (index % 5 + 1)))
    path = write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)
    read, _ = DatasetReader(tokenizer, kind="sft", max_length=256, over_length="refuse").read(path, shown_as=path)
    return [example for row in read for example in row.examples]


def train(
    trainable: Trainable,
    examples: Sequence[Example],
    steps: Sequence[StepPlan],
    *,
    stage: Stage | None = None,
    learning_rate: float = 1e-3,
    should_stop: Callable[[], str | None] = lambda: None,
) -> list[StepMetrics]:
    stage = stage or stage_of(micro_batch_size=max(len(micro) for step in steps for micro in step.micro_batches))
    recorder = Recorder()
    train_stage(
        trainable,
        stage,
        StageData("1-sft", examples, steps, []),
        StageState(make_optimizer(trainable, stage, learning_rate), step=0, trained_tokens=0),
        learning_rate=learning_rate,
        observer=recorder,
        should_stop=should_stop,
        save_checkpoint=lambda state: None,
        checkpoint_every_steps=None,
    )
    return recorder.steps


def steps_for(examples: Sequence[Example], micro: int, accumulation: int, epochs: int = 1) -> list[StepPlan]:
    lengths = [len(example.token_ids) for example in examples]
    sequences = [
        plan_epoch([0] * len(examples), [1.0], lengths, pack_tokens=None, seed=7, epoch=epoch)
        for epoch in range(epochs)
    ]
    return plan_steps(sequences, micro_batch_size=micro, gradient_accumulation_steps=accumulation, lengths=lengths)


def adapters_made_alike(base_dir: Path) -> tuple[Trainable, Any]:
    """Our adapter, and one that stock PEFT made; both start from the same numbers, none of them zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ours = load(base_dir, LoraMethod(rank=4, alpha=8))
    targets = r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), config)
    random = torch.Generator().manual_seed(3)
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.02)
            theirs[name].copy_(parameter)
    assert {name for name, _ in ours.parameters()} == {name for name, p in theirs.items() if p.requires_grad}
    return ours, stock


def losses_of_a_plain_loop(
    model: Any, examples: Sequence[Example], steps: Sequence[StepPlan], learning_rate: float
) -> list[float]:
    """Independent of ours: padded batches with an attention mask, transformers' loss, one backward for each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, foreach=False)
    losses = []
    for step in steps:
        chosen = [examples[i] for batch in step.micro_batches for sequence in batch for i in sequence]
        longest = max(len(example.token_ids) for example in chosen)
        ids, labels, mask = (torch.full((len(chosen), longest), fill) for fill in (0, -100, 0))
        for row, example in enumerate(chosen):
            length = len(example.token_ids)
            tokens = torch.tensor(example.token_ids.tolist())
            ids[row, :length], mask[row, :length] = tokens, 1
            labels[row, :length] = torch.where(torch.tensor(example.trained.tolist()), tokens, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_over_steps_equal_those_of_an_independent_loop(
    base_dir: Path, examples: list[Example], method: str
) -> None:
    from transformers import AutoModelForCausalLM

    if method == "lora":
        ours, stock = adapters_made_alike(base_dir)
    else:
        ours = load(base_dir, FullMethod())
        stock = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    steps = steps_for(examples, micro=3, accumulation=2, epochs=3)
    expected = losses_of_a_plain_loop(stock.train(), examples, steps, learning_rate=5e-3)
    got = [metrics.train_loss for metrics in train(ours, examples, steps, learning_rate=5e-3)]
    assert len(got) == 12
    assert got == pytest.approx(expected, abs=1e-4)
    assert got[-1] < got[0] - 0.1, "the comparison means something only if the weights moved"


@pytest.mark.parametrize("method", [LoraMethod(), FullMethod()])
def test_accumulating_four_times_one_equals_one_times_four(
    base_dir: Path, examples: list[Example], method: LoraMethod | FullMethod
) -> None:
    weights, losses = [], []
    for micro, accumulation in ((1, 4), (4, 1)):
        trainable = load(base_dir, method)
        metrics = train(trainable, examples, steps_for(examples, micro, accumulation))
        losses.append([m.train_loss for m in metrics] + [m.grad_norm for m in metrics])
        weights.append(torch.cat([p.detach().flatten() for _, p in trainable.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # Adam divides by the root of the squared gradient, so rounding shows where a gradient is nearly zero.
    assert float((weights[0] - weights[1]).abs().mean()) < 1e-6


def test_packed_examples_have_the_losses_they_have_alone(base_dir: Path, examples: list[Example]) -> None:
    trainable = load(base_dir, FullMethod())
    trainable.model.eval()
    packs = [tuple(pack) for pack in pack_best_fit([len(e.token_ids) for e in examples], capacity=200)]
    assert 1 < len(packs) < len(examples) / 2
    order = [i for pack in packs for i in pack]
    with torch.no_grad():
        packed, _ = token_losses(trainable, collate(examples, packs))
        alone = torch.cat([token_losses(trainable, collate(examples, [(i,)]))[0] for i in order])
        padded = torch.cat([token_losses(trainable, collate(examples, [(i,) for i in order]))[0]])
    assert torch.allclose(packed, alone, atol=1e-5)
    assert torch.allclose(padded, alone, atol=1e-5)


def test_packed_and_padded_training_give_the_same_gradient(base_dir: Path, examples: list[Example]) -> None:
    gradients = []
    for sequences in ([tuple(range(len(examples)))], [(i,) for i in range(len(examples))]):
        trainable = load(base_dir, FullMethod())
        losses, _ = token_losses(trainable, collate(examples, sequences))
        losses.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in trainable.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


def test_a_batch_predicts_each_trained_token_from_the_one_before_it(examples: list[Example]) -> None:
    batch = collate(examples, [(0, 1), (2,)])
    assert batch.position_ids is not None
    first = len(examples[0].token_ids)
    assert batch.position_ids[0, first] == 0
    assert batch.num_tokens == sum(len(examples[i].token_ids) for i in range(3))
    targets = batch.targets[0]
    assert targets[first - 1] == NOT_TRAINED, "the last token of an example must not predict the next example"
    wanted = [int(t) for e in examples[:2] for t, trained in zip(e.token_ids, e.trained, strict=True) if trained]
    assert targets[targets != NOT_TRAINED].tolist() == wanted


def test_gradient_checkpointing_changes_no_number(base_dir: Path, examples: list[Example]) -> None:
    steps = steps_for(examples, 4, 1)[:3]
    plain, checkpointed = (
        [m.train_loss for m in train(load(base_dir, LoraMethod(), gradient_checkpointing=on), examples, steps)]
        for on in (False, True)
    )
    assert checkpointed == pytest.approx(plain, abs=1e-6)


def test_all_linear_means_every_linear_layer_but_the_head(base_dir: Path) -> None:
    trainable = load(base_dir, LoraMethod())
    assert trainable.target_modules == (
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    )  # fmt: skip
    assert all("lora_" in name for name, _ in trainable.parameters())
    assert len(trainable.parameters()) == 2 * 7 * 2


def test_an_unknown_target_module_is_refused_with_the_known_ones(base_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"\['query'\] name no linear layer.*'q_proj'"):
        load(base_dir, LoraMethod(target_modules=("query",)))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("cosine", [0.5, 1.0, 1 - 0.9 * 0.5 * (1 - math.cos(math.pi / 8)), 0.55, 0.1]),
        ("linear", [0.5, 1.0, 1 - 0.9 / 8, 0.55, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_learning_rate_warms_up_and_ends_at_a_tenth(scheduler: str, expected: list[float]) -> None:
    stage = stage_of(scheduler=scheduler, warmup_share=0.2)
    shares = [learning_rate_share(stage, step, total_steps=10) for step in (1, 2, 3, 6, 10)]
    assert shares == pytest.approx(expected)


def test_a_number_that_is_none_stops_the_run_and_names_the_step(base_dir: Path, examples: list[Example]) -> None:
    trainable = load(base_dir, FullMethod())
    steps = steps_for(examples, 4, 1)

    def poison_before_the_third_step() -> None:
        calls.append(0)
        if len(calls) == 3:
            with torch.no_grad():
                next(iter(trainable.parameters()))[1].fill_(math.nan)

    calls: list[int] = []
    with pytest.raises(TrainingDivergedError, match=r"stage 1-sft step 3: loss nan.*lower learning_rate"):
        train(trainable, examples, steps, should_stop=poison_before_the_third_step)


def test_a_stop_is_asked_for_at_every_step_boundary(base_dir: Path, examples: list[Example]) -> None:
    answers = iter([None, None, "the operator said so"])
    trainable = load(base_dir, LoraMethod())
    with pytest.raises(StopRequested, match="the operator said so"):
        train(trainable, examples, steps_for(examples, 4, 1), should_stop=lambda: next(answers))
    assert next(answers, "used up") == "used up"


def test_evaluation_equals_transformers_own_loss_on_the_same_tokens(base_dir: Path, examples: list[Example]) -> None:
    trainable = load(base_dir, FullMethod())
    result = evaluate(trainable, examples, micro_batch_size=5)
    total = count = 0.0
    for example in examples:
        ids = torch.tensor([example.token_ids.tolist()])
        labels = torch.where(torch.tensor([example.trained.tolist()]), ids, -100)
        with torch.no_grad():
            total += float(trainable.model(input_ids=ids, labels=labels).loss) * example.num_trained
        count += example.num_trained
    assert result.loss == pytest.approx(total / count, abs=1e-5)
    assert 0.0 <= result.mean_token_accuracy <= 1.0


def test_text_windows_train_on_every_token_but_the_first(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", text_rows(20))
    reader = DatasetReader(tokenizer, kind="cpt", max_length=16, over_length="truncate")
    rows, account = reader.read(path, shown_as=path)
    assert (account.rows_used, account.rows_truncated, account.rows_dropped) == (20, 0, 0)
    batch = collate([e for row in rows for e in row.examples], [(0,)])
    assert batch.targets[0, :-1].tolist() == batch.token_ids[0, 1:].tolist()
