"""A stage of a recipe made ready to run: files read, open values chosen, steps planned.

Everything here is a pure function of recipe, files and tokenizer, so that a resumed run finds the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import InvalidDataError
from tune.choices import (
    Choice,
    choose_batch,
    choose_decay_share,
    choose_epochs,
    choose_final_weights,
    choose_learning_rate,
    choose_max_length,
    choose_num_cycles,
    choose_packing,
    choose_validation,
    choose_warmup_share,
)
from tune.data.batches import EpochPlan, StagePlan, plan_epoch
from tune.data.clean import duplicates_to_drop
from tune.data.dataset import DatasetReader, ReadOptions, RowAccount, count_overlap, held_out_mask
from tune.data.examples import Examples
from tune.data.mask import Example
from tune.data.pairs import Pairs
from tune.data.store import StoredRows
from tune.dpo import PreferenceObjective, Reference
from tune.model import BaseShape
from tune.objectives import LanguageModelling
from tune.progress import TrainingEvent
from tune.recipe import Dpo, Recipe, Stage
from tune.sources import Clean, DataSource, Validation
from tune.train import StageData


@dataclass(frozen=True, slots=True)
class ReadyStage:
    stage: Stage
    """With every open value filled in; this goes into the manifest."""
    learning_rate: float
    micro_batch_size: int
    data: StageData
    reference: Reference | None
    """Of a dpo stage: empty, until it is measured where the stage begins."""
    accounts: tuple[RowAccount, ...]
    """Of training files, then of the validation file if there is one."""
    notes: tuple[TrainingEvent, ...]
    """Choices, accounts and warnings, in the order in which they came up."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of all training files of a stage, and those it is measured on."""

    sources: list[StoredRows]
    held_out: NDArray[np.bool_]
    """For each row, all sources in one line, whether it is kept out of training."""
    validation: StoredRows | None
    """Of a file of their own."""
    accounts: list[RowAccount]


def prepare_stage(
    recipe: Recipe,
    index: int,
    *,
    tokenizer: Any,
    base_shape: BaseShape,
    recipe_dir: Path,
    store_dir: Path | None = None,
) -> ReadyStage:
    """Read and plan ``recipe.stages[index]``. Tokenised rows are kept in ``store_dir`` where it is given.

    Raises:
        InvalidDataError: a faulty row, or nothing to train on.
        NotFoundError: a data file is not there.
    """
    stage = recipe.stages[index]
    label = f"{index + 1}-{stage.kind}"
    rate = choose_learning_rate(recipe.method, stage, base_shape.hidden_size)
    packing = choose_packing(stage)
    max_length = choose_max_length(stage, base_shape.context_tokens)
    validation_file = choose_validation(stage)
    stage = stage.model_copy(update={"validation": validation_file.value})
    read = _read_rows(
        recipe,
        stage,
        tokenizer=tokenizer,
        max_length=max_length.value,
        recipe_dir=recipe_dir,
        store_dir=store_dir,
    )
    notes = [TrainingEvent("info", f"stage {label}: {a.path} is {a.format}") for a in read.accounts]
    notes += [
        TrainingEvent("warn" if account.lost_something else "info", f"stage {label}: {account.sentence()}")
        for account in read.accounts
    ]
    notes += _overlap_warning(label, read)

    examples = Examples(read.sources, ~read.held_out)
    epochs = choose_epochs(stage, int((~read.held_out).sum()))
    pack_tokens = max_length.value if packing.value else None
    weights = [source.weight for source in stage.data]
    # What a step counts: examples, or pairs of them.
    per_unit = 2 if stage.kind == "dpo" else 1
    sources = examples.sources[::per_unit]
    lengths = examples.lengths.reshape(-1, per_unit).sum(axis=1)
    seed = recipe.seed + 1_000_003 * index  # stages that read the same file should not see the same order

    def sequences_of(epoch: int, grouped_per_step: int | None = None) -> EpochPlan:
        return plan_epoch(
            sources,
            weights,
            lengths,
            pack_tokens=pack_tokens,
            seed=seed,
            epoch=epoch,
            grouped_per_step=grouped_per_step,
        )

    first_epoch = sequences_of(0)
    if not first_epoch:
        raise InvalidDataError(f"stage {label}: data weights are so small that an epoch visits no row; raise them")
    final_weights = choose_final_weights(stage)
    schedule: dict[str, Choice[float | None] | Choice[int | None]] = {
        "warmup_share": choose_warmup_share(stage),
        "num_cycles": choose_num_cycles(stage),
        "decay_share": choose_decay_share(stage),
    }
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
            "final_weights": final_weights.value,
            **{name: choice.value for name, choice in schedule.items()},
        }
    )
    grouped = batch.value.sequences_per_step if stage.group_by_length and not packing.value else None
    steps = _plan(resolved, len(first_epoch), lambda epoch: sequences_of(epoch, grouped), lengths)
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
        ("final_weights", final_weights.value, final_weights.reason),
        *((name, choice.value, choice.reason) for name, choice in schedule.items() if choice.value is not None),
    ):
        notes.append(TrainingEvent("info", f"stage {label}: {name} = {value} ({reason})"))
    if stage.validation is not None and read.validation is not None:
        ignored = list(stage.validation.ignored_keys or ())
        how = f"system_prompt={stage.validation.system_prompt!r}, ignored_keys={ignored}"
        text = f"stage {label}: {stage.validation.path} has {how} ({validation_file.reason})"
        notes.append(TrainingEvent("info", text))
    validation = _validation_examples(read)
    reference = Reference() if stage.kind == "dpo" else None
    return ReadyStage(
        stage=resolved,
        learning_rate=rate.value,
        micro_batch_size=batch.value.micro_batch_size,
        data=StageData(
            label=label,
            examples=examples if reference is None else Pairs(examples),
            steps=steps,
            epoch_ends=steps.epoch_ends,
            validation=validation if reference is None else Pairs(validation),
            make_objective=LanguageModelling
            if reference is None
            else partial(PreferenceObjective, options=stage.dpo or Dpo(), reference=reference),
            name_row=lambda unit: f"{stage.data[sources[unit]].path}:{examples[unit * per_unit].line}",
            seed=seed,
        ),
        reference=reference,
        accounts=tuple(read.accounts),
        notes=tuple(notes),
    )


def _read_rows(
    recipe: Recipe, stage: Stage, *, tokenizer: Any, max_length: int, recipe_dir: Path, store_dir: Path | None
) -> _Rows:
    reader = DatasetReader(
        tokenizer, kind=stage.kind, max_length=max_length, over_length=stage.over_length, store_dir=store_dir
    )
    duplicates = _duplicates(reader, stage, recipe_dir)
    sources, accounts = [], []
    for source, dropped in zip(stage.data, duplicates, strict=True):
        rows, account = _read_file(reader, source, stage.clean, recipe_dir, dropped)
        sources.append(rows)
        accounts.append(account)
    held_out: NDArray[np.bool_] = np.zeros(sum(map(len, sources)), dtype=np.bool_)
    if stage.validation is None:
        return _Rows(sources, held_out, None, accounts)
    if stage.validation.path is not None:
        rows, account = _read_file(reader, _validation_source(stage.validation), stage.clean, recipe_dir, {})
        return _Rows(sources, held_out, rows, [*accounts, account])
    assert stage.validation.share is not None, stage.validation
    held_out = held_out_mask(chain.from_iterable(sources), stage.validation.share, recipe.seed)
    borders = np.cumsum([len(rows) for rows in sources])[:-1]
    for account, part in zip(accounts, np.split(held_out, borders), strict=True):
        account.rows_held_out = int(part.sum())
    return _Rows(sources, held_out, None, accounts)


def _duplicates(reader: DatasetReader, stage: Stage, recipe_dir: Path) -> list[dict[int, str]]:
    """For each source the rows that are dropped because another says the same."""
    asked = stage.clean.duplicates
    if asked == "keep":
        return [{} for _ in stage.data]
    files = [reader.open(recipe_dir / source.path, _options(source, stage.clean)).rows() for source in stage.data]
    return duplicates_to_drop(files, "exact" if asked == "drop_exact" else "near")


def _options(source: DataSource, clean: Clean) -> ReadOptions:
    return ReadOptions(source.format, source.system_prompt, source.ignored_keys, clean.personal_data)


def _validation_source(validation: Validation) -> DataSource:
    assert validation.path is not None, validation
    return DataSource(
        path=validation.path,
        format=validation.format,
        system_prompt=validation.system_prompt or None,
        ignored_keys=validation.ignored_keys or (),
    )


def _read_file(
    reader: DatasetReader, source: DataSource, clean: Clean, recipe_dir: Path, duplicates: dict[int, str]
) -> tuple[StoredRows, RowAccount]:
    try:
        return reader.read(
            recipe_dir / source.path, shown_as=source.path, options=_options(source, clean), duplicates=duplicates
        )
    except InvalidDataError as error:
        message = error.message if str(source.path) in error.message else f"{source.path}: {error.message}"
        raise InvalidDataError(message, code=error.code, param=error.param, line=error.line) from error


def _validation_examples(read: _Rows) -> Sequence[Example]:
    """The rows of the validation file, else those that were held out."""
    if read.validation is not None:
        return Examples([read.validation], np.ones(len(read.validation), dtype=np.bool_))
    return Examples(read.sources, read.held_out)


def _overlap_warning(label: str, read: _Rows) -> list[TrainingEvent]:
    if read.validation is None:  # what is held out of the training files is disjoint from the rest by its choice
        return []
    overlap = count_overlap(chain.from_iterable(read.sources), read.validation)
    if not overlap:
        return []
    text = f"stage {label}: {overlap} of {len(read.validation)} validation rows are also training rows"
    return [TrainingEvent("warn", f"{text}, so valid_loss looks better than it is")]


def _plan(
    stage: Stage, first_size: int, sequences_of: Callable[[int], EpochPlan], lengths: NDArray[np.int32]
) -> StagePlan:
    """Steps for ``max_steps``, or for ``epochs`` whole and broken ones. ``first_size`` is that of the first epoch."""
    assert stage.micro_batch_size is not None, stage
    assert stage.gradient_accumulation_steps is not None, stage
    per_step = stage.micro_batch_size * stage.gradient_accumulation_steps

    def size_of(epoch: int) -> int:
        """Without packing every epoch has as many sequences as the first; packs of newly drawn rows may not."""
        return len(sequences_of(epoch)) if epoch and stage.packing else first_size

    sizes = [first_size]
    if stage.max_steps is not None:
        while sum(-(-size // per_step) for size in sizes) < stage.max_steps:
            sizes.append(size_of(len(sizes)))
    else:
        assert stage.epochs is not None, stage
        whole = int(stage.epochs)
        sizes = [size_of(epoch) for epoch in range(whole)]
        part = stage.epochs - whole
        if part > 0:
            sizes.append(max(1, round(part * size_of(whole))))
    return StagePlan(
        sequences_of,
        sizes,
        micro_batch_size=stage.micro_batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation_steps,
        lengths=lengths,
        max_steps=stage.max_steps,
    )
