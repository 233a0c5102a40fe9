"""A stage of a recipe made ready to run: files read, open values chosen, steps planned.

Everything here is a pure function of recipe, files and tokenizer, so that a resumed run finds the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from tune.data.dataset import RowAccount
from tune.data.examples import Examples
from tune.data.pairs import Pairs
from tune.dpo import PreferenceObjective, Reference
from tune.model import BaseShape
from tune.objectives import LanguageModelling
from tune.progress import TrainingEvent
from tune.recipe import Dpo, Recipe, Stage
from tune.stage_rows import nothing_held_out_warning, overlap_warning, read_rows, validation_examples
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
    read = read_rows(
        recipe,
        stage,
        param=f"stages[{index}]",
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
    notes += overlap_warning(label, read)
    notes += nothing_held_out_warning(label, stage, read)

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
    validations = _choose_validations(stage, steps)
    resolved = resolved.model_copy(
        update={"evaluate_every_steps": validations.value, "evaluate_every_epochs": None}  # which are steps now
    )
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
    validation = validation_examples(read)
    if stage.evaluate_every_epochs is not None and len(validation):
        text = f"stage {label}: evaluate_every_steps = {validations.value} ({validations.reason})"
        notes.append(TrainingEvent("info", text))
    if stage.validation is not None and read.validation is not None:
        ignored = list(stage.validation.ignored_keys or ())
        how = f"system_prompt={stage.validation.system_prompt!r}, ignored_keys={ignored}"
        text = f"stage {label}: {stage.validation.path} has {how} ({validation_file.reason})"
        notes.append(TrainingEvent("info", text))
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


def _choose_validations(stage: Stage, steps: StagePlan) -> Choice[int | None]:
    """Steps between validations. Epochs are equally long, but for packs of newly drawn rows."""
    if stage.evaluate_every_epochs is None:
        return Choice(stage.evaluate_every_steps, "given in the recipe")
    ends = steps.epoch_ends
    counted = stage.evaluate_every_epochs
    every = "each epoch's end" if counted == 1 else f"each {counted} epochs' end"
    return Choice(ends[min(counted, len(ends)) - 1], every)


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
