"""From OpenAI's hyper-parameters and the ``capo`` object to a recipe, in one place and in one direction.

What ``"auto"`` becomes is decided by :mod:`tune.choices`, like every open value of a recipe, when the job is
created; the job shows the numbers from then on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from registry.errors import InvalidRequestError
from tune.choices import choose_batch, choose_epochs
from tune.jobs.integrations import wandb_options
from tune.jobs.records import Hyperparameters, JobMethod, JobRecord, NewJob
from tune.jobs.requests import CapoBody, DpoHyperparametersBody, HyperparametersBody
from tune.jobs.stages import all_stages, main_stage_of
from tune.jobs.starting_model import base_of
from tune.methods import LoraMethod, publishes_adapter
from tune.recipe import Dpo, Recipe, Stage
from tune.recipe_file import parse_recipe
from tune.sources import DataSource, Validation

HELD_OUT_SHARE = 0.1
FEWEST_ROWS_TO_HOLD_OUT = 50
"""A tenth of the rows is held out when there is no validation file and at least this many rows.

Unlike OpenAI's, Capo's artifacts say how much better than the base they are, and a figure measured on
training rows would only show memory. Below 50 rows a tenth is fewer than five, which measures nothing, so
all rows are trained on. ``capo.validation_share: 0`` trains on all rows at any size.
"""
CHECKPOINT_EVERY_STEPS = 100
"""A killed job repeats at most this many steps. An adapter's checkpoint is small."""
_LARGEST_MICRO_BATCH = 8
_STAGE_KINDS: dict[JobMethod, Literal["sft", "dpo"]] = {"supervised": "sft", "dpo": "dpo"}


def resolve_hyperparameters(
    given: HyperparametersBody,
    extension: CapoBody,
    *,
    rows: int,
    has_validation_file: bool,
    method: JobMethod = "supervised",
) -> Hyperparameters:
    """Turn each ``"auto"`` into a number, for a training file of ``rows`` rows."""
    open_stage = Stage(kind=_STAGE_KINDS[method], data=(DataSource(path=Path("training.jsonl")),))
    share = held_out_share(extension, rows=rows, has_validation_file=has_validation_file)
    trained_rows = max(1, rows - round(rows * share))
    if given.n_epochs == "auto":
        epochs = choose_epochs(open_stage, trained_rows).value
        n_epochs = 1 if epochs is None else max(1, round(epochs))
    else:
        n_epochs = given.n_epochs
    if given.batch_size == "auto":
        batch_size = choose_batch(open_stage, trained_rows, float(n_epochs)).value.sequences_per_step
    else:
        batch_size = given.batch_size
    multiplier = given.learning_rate_multiplier
    beta: float | None = None
    if method == "dpo":
        asked = given.beta if isinstance(given, DpoHyperparametersBody) else "auto"
        beta = Dpo().beta if asked == "auto" else float(asked)
    return Hyperparameters(
        n_epochs=n_epochs,
        batch_size=batch_size,
        learning_rate_multiplier=1.0 if multiplier == "auto" else float(multiplier),
        beta=beta,
    )


def held_out_share(extension: CapoBody, *, rows: int, has_validation_file: bool) -> float:
    """Which share of the training rows is kept for validation; 0 = none."""
    if has_validation_file:
        return 0.0
    if extension.validation_share is not None:
        return extension.validation_share
    return HELD_OUT_SHARE if rows >= FEWEST_ROWS_TO_HOLD_OUT else 0.0


def job_recipe(
    job: JobRecord | NewJob,
    *,
    artifact_name: str,
    base_model: str,
    training_rows: int,
    validation_rows: int = 0,
) -> Recipe:
    """The recipe of a job. ``base_model`` is what the recipe's field of that name takes; ``validation_rows`` are those
    of the validation file, if there is one.

    Data paths are file ids, relative to the files directory: no event or manifest shows a path of the server,
    and a job goes on from its checkpoint wherever that directory is mounted.

    Raises:
        InvalidRequestError: the job asks for something no recipe can say.
    """
    extension = parse_extension(job.extensions)
    micro_batch_size = _largest_divisor(job.hyperparameters.batch_size, _LARGEST_MICRO_BATCH)
    share = held_out_share(extension, rows=training_rows, has_validation_file=job.validation_file is not None)
    validation: Validation | None = None
    if job.validation_file is not None:
        validation = Validation(path=Path(job.validation_file))
    elif share > 0:
        # Of what the client never asked for, nothing may fail the job.
        validation = Validation(share=share, required=extension.validation_share is not None)
    stage: dict[str, Any] = {
        "kind": _STAGE_KINDS[job.method],
        "data": (DataSource(path=Path(job.training_file)),),
        "validation": validation,
        "epochs": float(job.hyperparameters.n_epochs),
        "micro_batch_size": micro_batch_size,
        "gradient_accumulation_steps": job.hyperparameters.batch_size // micro_batch_size,
        "learning_rate_multiplier": job.hyperparameters.learning_rate_multiplier,
    }
    given: tuple[Literal["max_length", "over_length", "evaluate_every_steps"], ...] = (
        "max_length",
        "over_length",
        "evaluate_every_steps",
    )
    stage |= {name: value for name in given if (value := getattr(extension, name)) is not None}
    if job.hyperparameters.beta is not None:
        stage["dpo"] = Dpo(beta=job.hyperparameters.beta)
    recipe: dict[str, Any] = {
        "name": artifact_name,
        "base_model": base_model,
        "method": extension.method or extension.lora or LoraMethod(),
        "start_from": job.model if job.model.startswith("ft:") else None,
        "stages": _validated(
            all_stages(extension, stage), main_stage_of(extension), rows=training_rows, validation_rows=validation_rows
        ),
        "seed": job.seed,
        "checkpoint_every_steps": extension.checkpoint_every_steps or CHECKPOINT_EVERY_STEPS,
        "promote_alias": extension.alias,
    }
    recipe |= wandb_options(
        job.integrations, base_model=base_of(job.model), job_id=job.id if isinstance(job, JobRecord) else None
    )
    whole: tuple[Literal["dtype", "save_dtype", "evaluation", "promote_if", "exports"], ...] = (
        "dtype",
        "save_dtype",
        "evaluation",
        "promote_if",
        "exports",
    )
    recipe |= {name: value for name in whole if (value := getattr(extension, name)) is not None}
    parsed = parse_recipe(recipe)
    _check_servable(parsed)
    _check_no_paths(parsed)
    _check_judged(parsed)
    return parsed


def _validated(
    stages: tuple[Mapping[str, Any], ...], main: int, *, rows: int, validation_rows: int
) -> tuple[Mapping[str, Any], ...]:
    """The job's own stage is validated at each epoch's end, where the client does not say when.

    Where the validation file is larger than the training file, at the end of as many epochs as it is larger: so all
    validations together read no more rows than training does, which a forward pass alone makes a third of its cost.
    """
    own = stages[main]
    if own["validation"] is None or any(
        own.get(name) is not None for name in ("evaluate_every_steps", "evaluate_every_epochs")
    ):
        return stages
    every = max(1, math.ceil(validation_rows / max(1, rows)))
    return (*stages[:main], {**own, "evaluate_every_epochs": every}, *stages[main + 1 :])


def _check_servable(recipe: Recipe) -> None:
    if not publishes_adapter(recipe.method):
        raise InvalidRequestError(
            f"capo.method: kind {recipe.method.kind!r} publishes whole weights, which cannot be called beside "
            "other models; set extract_lora_rank, or train with capo tune",
            param="capo.method",
        )


def _check_no_paths(recipe: Recipe) -> None:
    evaluation = recipe.evaluation
    if evaluation is None:
        return
    if evaluation.data or evaluation.general or any(benchmark.file for benchmark in evaluation.benchmarks):
        raise InvalidRequestError(
            "capo.evaluation has a path, and a client names no files of the server: leave data, general and file out: "
            "the held-out rows are evaluated",
            param="capo.evaluation",
        )


def _check_judged(recipe: Recipe) -> None:
    """A recipe's alias may come from elsewhere (``capo tune --alias``) and its rows from a file; a job's may not."""
    if recipe.promote_if is not None and recipe.promote_alias is None:
        raise InvalidRequestError(
            f"capo.promote_if={recipe.promote_if!r} decides whether an alias moves, and none is given; set capo.alias",
            param="capo.promote_if",
        )
    if recipe.evaluation is None:
        return
    if any(stage.kind != "dpo" and stage.validation is not None for stage in recipe.stages):
        return
    if all(stage.kind == "dpo" for stage in recipe.stages):
        reason = "it is measured on held-out chat rows, and preference rows are none; leave it out"
    else:
        reason = (
            "no rows are held out: give validation_file or capo.validation_share (nothing is held out by itself of "
            f"fewer than {FEWEST_ROWS_TO_HOLD_OUT} rows)"
        )
    raise InvalidRequestError(f"capo.evaluation has no rows to judge on: {reason}", param="capo.evaluation")


def parse_extension(stored: Mapping[str, Any]) -> CapoBody:
    """The ``capo`` object as the store keeps it (JSON) back to its record."""
    return CapoBody.model_validate(dict(stored), strict=True)


def _largest_divisor(number: int, limit: int) -> int:
    """So that micro batch times accumulation is exactly the batch that was asked for."""
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)
