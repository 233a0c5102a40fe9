"""Which uploaded files a job reads, and whether it can."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from registry.errors import InvalidRequestError, NotFoundError
from tune.data.rows import FEWEST_ROWS
from tune.jobs.checks import given_method
from tune.jobs.file_store import FileStore
from tune.jobs.records import FileRecord, JobMethod, RowFormat
from tune.jobs.requests import CreateJobBody
from tune.recipe import Recipe, Stage

_OF_METHOD: dict[JobMethod, RowFormat] = {"supervised": "chat", "dpo": "preference"}
_OF_KIND: dict[str, tuple[RowFormat, ...]] = {
    "sft": ("chat",),
    "cpt": ("text",),
    "mixed": ("chat", "text"),
    "dpo": ("preference",),
}


@dataclass(frozen=True, slots=True)
class TrainingFiles:
    training: FileRecord
    validation: FileRecord | None


def training_files(body: CreateJobBody, store: FileStore) -> TrainingFiles:
    """The files that OpenAI's fields name.

    Raises:
        InvalidRequestError: one is not there, has rows of another kind or too few, or both are the same.
    """
    needed = _OF_METHOD[given_method(body)]
    training = _fine_tune_file(store, "training_file", body.training_file, (needed,))
    if training.rows is None or training.rows < FEWEST_ROWS:
        raise InvalidRequestError(
            f"training_file {training.id} has {training.rows or 0} rows; {FEWEST_ROWS} are the minimum",
            code="too_few_rows",
            param="training_file",
        )
    if body.validation_file is None:
        return TrainingFiles(training, None)
    validation = _fine_tune_file(store, "validation_file", body.validation_file, (needed,))
    if validation.sha256 == training.sha256:
        raise InvalidRequestError(
            "validation_file has the same content as training_file, so it would measure only memory; "
            "upload rows that are not trained on",
            param="validation_file",
        )
    return TrainingFiles(training, validation)


def file_ids_of(stage: Stage) -> list[str]:
    """The files that a stage of a job reads; its paths are their ids."""
    validation = [] if stage.validation is None or stage.validation.path is None else [stage.validation.path]
    return [str(path) for path in (*(source.path for source in stage.data), *validation)]


def further_files(recipe: Recipe, main_stage: int, store: FileStore) -> list[str]:
    """The ids of the files that only the other stages read.

    Raises:
        InvalidRequestError: one of them is not there, or has rows that its stage cannot read.
    """
    found: dict[str, None] = {}
    for index, stage in enumerate(recipe.stages):
        if index == main_stage:
            continue
        for file_id in file_ids_of(stage):
            _fine_tune_file(store, f"capo.stages[{index}]", file_id, _OF_KIND[stage.kind])
            found[file_id] = None
    known = set(file_ids_of(recipe.stages[main_stage]))
    return [file_id for file_id in found if file_id not in known]


def _fine_tune_file(store: FileStore, param: str, file_id: str, formats: Collection[RowFormat]) -> FileRecord:
    try:
        record = store.get(file_id)
    except NotFoundError as error:
        raise InvalidRequestError(
            f"{param}: there is no file {file_id[:80]!r}; upload it with purpose 'fine-tune'",
            code="file_not_found",
            param=param,
        ) from error
    if record.purpose != "fine-tune":
        raise InvalidRequestError(
            f"{param}: {file_id} has the purpose {record.purpose!r}, 'fine-tune' is needed",
            code="wrong_purpose",
            param=param,
        )
    if record.row_format not in formats:
        raise InvalidRequestError(
            f"{param}: {file_id} holds {record.row_format} rows, and what is asked for trains on "
            f"{' or '.join(formats)} rows; give another file, or the method that fits it",
            code="wrong_format",
            param=param,
        )
    return record
