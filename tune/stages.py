"""A stage of a recipe made ready to run: files read, open values chosen, steps planned.

Everything here is a pure function of recipe, files and tokenizer, so that a resumed run finds the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.errors import InvalidDataError
from tune.choices import choose_batch, choose_epochs, choose_learning_rate, choose_max_length, choose_packing
from tune.data.batches import Pack, StepPlan, plan_epoch, plan_steps
from tune.data.dataset import DatasetReader, EncodedRow, RowAccount, count_overlap, hold_out
from tune.model import BaseShape
from tune.progress import TrainingEvent
from tune.recipe import DataSource, Recipe, Stage
from tune.train import StageData


@dataclass(frozen=True, slots=True)
class ReadyStage:
    stage: Stage
    """With every open value filled in; this goes into the manifest."""
    learning_rate: float
    micro_batch_size: int
    data: StageData
    accounts: tuple[RowAccount, ...]
    """Of training files, then of the validation file if there is one."""
    notes: tuple[TrainingEvent, ...]
    """Choices, accounts and warnings, in the order in which they came up."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of all training files of a stage, and the held-out ones."""

    rows: list[EncodedRow]
    sources: list[int]
    validation: list[EncodedRow]
    accounts: list[RowAccount]


def prepare_stage(recipe: Recipe, index: int, *, tokenizer: Any, base_shape: BaseShape, recipe_dir: Path) -> ReadyStage:
    """Read and plan ``recipe.stages[index]``.

    Raises:
        InvalidDataError: a faulty row, or nothing to train on.
        NotFoundError: a data file is not there.
    """
    stage = recipe.stages[index]
    label = f"{index + 1}-{stage.kind}"
    rate = choose_learning_rate(recipe.method, stage, base_shape.hidden_size)
    packing = choose_packing(stage)
    max_length = choose_max_length(stage, base_shape.context_tokens)
    read = _read_rows(recipe, stage, tokenizer=tokenizer, max_length=max_length.value, recipe_dir=recipe_dir)
    notes = [
        TrainingEvent("warn" if account.lost_something else "info", f"stage {label}: {account.sentence()}")
        for account in read.accounts
    ]
    notes += _overlap_warning(label, read)

    examples = [example for row in read.rows for example in row.examples]
    sources = [source for row, source in zip(read.rows, read.sources, strict=True) for _ in row.examples]
    lengths = [len(example.token_ids) for example in examples]
    epochs = choose_epochs(stage, len(read.rows))
    pack_tokens = max_length.value if packing.value else None

    def sequences_of(epoch: int) -> list[Pack]:
        weights = [source.weight for source in stage.data]
        seed = recipe.seed + 1_000_003 * index  # stages that read the same file should not see the same order
        return plan_epoch(sources, weights, lengths, pack_tokens=pack_tokens, seed=seed, epoch=epoch)

    first_epoch = sequences_of(0)
    if not first_epoch:
        raise InvalidDataError(f"stage {label}: data weights are so small that an epoch visits no row; raise them")
    batch = choose_batch(stage, len(first_epoch), epochs.value)
    resolved = stage.model_copy(
        update={
            "learning_rate": rate.value,
            "learning_rate_multiplier": 1.0,  # it is in the rate now
            "packing": packing.value,
            "max_length": max_length.value,
            "epochs": epochs.value,
            "micro_batch_size": batch.value.micro_batch_size,
            "gradient_accumulation_steps": batch.value.gradient_accumulation_steps,
        }
    )
    steps = _plan(resolved, batch.value.sequences_per_step, first_epoch, sequences_of, lengths)
    for name, value, reason in (
        ("learning_rate", f"{rate.value:g}", rate.reason),
        ("packing", packing.value, packing.reason),
        ("max_length", max_length.value, max_length.reason),
        ("epochs", epochs.value, epochs.reason),
        (
            "micro_batch_size x gradient_accumulation_steps",
            f"{batch.value.micro_batch_size} x {batch.value.gradient_accumulation_steps}",
            batch.reason,
        ),
    ):
        notes.append(TrainingEvent("info", f"stage {label}: {name} = {value} ({reason})"))
    held_out = [example for row in read.validation for example in row.examples]
    return ReadyStage(
        stage=resolved,
        learning_rate=rate.value,
        micro_batch_size=batch.value.micro_batch_size,
        data=StageData(label=label, examples=examples, steps=steps, validation=held_out),
        accounts=tuple(read.accounts),
        notes=tuple(notes),
    )


def _read_rows(recipe: Recipe, stage: Stage, *, tokenizer: Any, max_length: int, recipe_dir: Path) -> _Rows:
    reader = DatasetReader(tokenizer, kind=stage.kind, max_length=max_length, over_length=stage.over_length)
    read = _Rows([], [], [], [])
    for number, source in enumerate(stage.data):
        rows, account = _read_file(reader, source, recipe_dir)
        read.rows.extend(rows)
        read.sources.extend([number] * len(rows))
        read.accounts.append(account)
    if stage.validation is None:
        return read
    if stage.validation.path is not None:
        rows, account = _read_file(reader, DataSource(path=stage.validation.path), recipe_dir)
        read.accounts.append(account)
        return _Rows(read.rows, read.sources, rows, read.accounts)
    assert stage.validation.share is not None, stage.validation
    kept, held_out = hold_out(read.rows, stage.validation.share, recipe.seed)
    return _Rows(
        rows=[read.rows[i] for i in kept],
        sources=[read.sources[i] for i in kept],
        validation=[read.rows[i] for i in held_out],
        accounts=read.accounts,
    )


def _read_file(reader: DatasetReader, source: DataSource, recipe_dir: Path) -> tuple[list[EncodedRow], RowAccount]:
    try:
        return reader.read(recipe_dir / source.path, shown_as=source.path)
    except InvalidDataError as error:
        message = error.message if str(source.path) in error.message else f"{source.path}: {error.message}"
        raise InvalidDataError(message, code=error.code, param=error.param, line=error.line) from error


def _overlap_warning(label: str, read: _Rows) -> list[TrainingEvent]:
    overlap = count_overlap(read.rows, read.validation)
    if not overlap:
        return []
    text = f"stage {label}: {overlap} of {len(read.validation)} validation rows are also training rows"
    return [TrainingEvent("warn", f"{text}, so valid_loss looks better than it is")]


def _plan(
    stage: Stage,
    per_step: int,
    first_epoch: list[Pack],
    sequences_of: Callable[[int], list[Pack]],
    lengths: Sequence[int],
) -> list[StepPlan]:
    """Steps for ``max_steps``, or for ``epochs`` whole and broken ones."""
    assert stage.micro_batch_size is not None, stage
    assert stage.gradient_accumulation_steps is not None, stage
    epochs = [first_epoch]
    if stage.max_steps is not None:
        num_steps = _num_steps(first_epoch, per_step)
        while num_steps < stage.max_steps:
            epochs.append(sequences_of(len(epochs)))
            num_steps += _num_steps(epochs[-1], per_step)
    else:
        assert stage.epochs is not None, stage
        whole = int(stage.epochs)
        epochs = [first_epoch, *(sequences_of(number) for number in range(1, whole))][:whole]
        part = stage.epochs - whole
        if part > 0:
            last = first_epoch if whole == 0 else sequences_of(whole)
            epochs.append(last[: max(1, round(part * len(last)))])
    steps = plan_steps(
        epochs,
        micro_batch_size=stage.micro_batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation_steps,
        lengths=lengths,
    )
    return steps[: stage.max_steps]


def _num_steps(sequences: Sequence[Pack], per_step: int) -> int:
    return -(-len(sequences) // per_step)
