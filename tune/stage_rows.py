"""The rows of a stage: read from its files, with those that are held out, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import InvalidDataError
from tune.data.clean import duplicates_to_drop
from tune.data.dataset import DatasetReader, ReadOptions, RowAccount, count_overlap, held_out_mask
from tune.data.examples import Examples
from tune.data.mask import Example
from tune.data.store import StoredRows, TokenisedRow
from tune.progress import TrainingEvent
from tune.recipe import Recipe, Stage
from tune.sources import Clean, DataSource, Validation


@dataclass(frozen=True, slots=True)
class StageRows:
    """Rows of all training files of a stage, and those it is measured on."""

    sources: list[StoredRows]
    held_out: NDArray[np.bool_]
    """For each row, all sources in one line, whether it is kept out of training."""
    validation: StoredRows | None
    """Of a file of their own."""
    accounts: list[RowAccount]


def read_rows(
    recipe: Recipe,
    stage: Stage,
    *,
    param: str,
    tokenizer: Any,
    max_length: int,
    recipe_dir: Path,
    store_dir: Path | None,
) -> StageRows:
    """``param`` is the recipe's word for the stage.

    Raises:
        InvalidDataError: a faulty row, or nothing to hold out; ``param`` is the field that names the file.
        NotFoundError: a data file is not there.
    """
    reader = DatasetReader(
        tokenizer, kind=stage.kind, max_length=max_length, over_length=stage.over_length, store_dir=store_dir
    )
    duplicates = _duplicates(reader, stage, recipe_dir)
    sources, accounts = [], []
    for place, (source, dropped) in enumerate(zip(stage.data, duplicates, strict=True)):
        with _faults_of(source, f"{param}.data[{place}]"):
            rows, account = _read_file(reader, source, stage.clean, recipe_dir, dropped)
        sources.append(rows)
        accounts.append(account)
    held_out: NDArray[np.bool_] = np.zeros(sum(map(len, sources)), dtype=np.bool_)
    if stage.validation is None:
        return StageRows(sources, held_out, None, accounts)
    if stage.validation.path is not None:
        source = _validation_source(stage.validation)
        with _faults_of(source, f"{param}.validation"):
            rows, account = _read_file(reader, source, stage.clean, recipe_dir, {})
        return StageRows(sources, held_out, rows, [*accounts, account])
    assert stage.validation.share is not None, stage.validation
    if not stage.validation.required and not _some_differ(chain.from_iterable(sources)):
        return StageRows(sources, held_out, None, accounts)
    held_out = held_out_mask(chain.from_iterable(sources), stage.validation.share, recipe.seed)
    borders = np.cumsum([len(rows) for rows in sources])[:-1]
    for account, part in zip(accounts, np.split(held_out, borders), strict=True):
        account.rows_held_out = int(part.sum())
    return StageRows(sources, held_out, None, accounts)


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
    return reader.read(
        recipe_dir / source.path, shown_as=source.path, options=_options(source, clean), duplicates=duplicates
    )


@contextmanager
def _faults_of(source: DataSource, param: str) -> Iterator[None]:
    """Say of which file a fault is, and which field of the recipe names it: of its row the message tells."""
    try:
        yield
    except InvalidDataError as error:
        message = error.message if str(source.path) in error.message else f"{source.path}: {error.message}"
        raise InvalidDataError(message, code=error.code, param=param, line=error.line) from error


def validation_examples(read: StageRows) -> Sequence[Example]:
    """The rows of the validation file, else those that were held out."""
    if read.validation is not None:
        return Examples([read.validation], np.ones(len(read.validation), dtype=np.bool_))
    return Examples(read.sources, read.held_out)


def overlap_warning(label: str, read: StageRows) -> list[TrainingEvent]:
    if read.validation is None:  # what is held out of the training files is disjoint from the rest by its choice
        return []
    overlap = count_overlap(chain.from_iterable(read.sources), read.validation)
    if not overlap:
        return []
    text = f"stage {label}: {overlap} of {len(read.validation)} validation rows are also training rows"
    return [TrainingEvent("warn", f"{text}, so valid_loss looks better than it is")]


def _some_differ(rows: Iterable[TokenisedRow]) -> bool:
    digests = (row.digest for row in rows)
    first = next(digests, None)
    return any(digest != first for digest in digests)


def nothing_held_out_warning(label: str, stage: Stage, read: StageRows) -> list[TrainingEvent]:
    if stage.validation is None or stage.validation.share is None or read.held_out.any():
        return []
    text = f"stage {label}: all rows are equal, so none is held out for validation and all are trained on"
    return [TrainingEvent("warn", text)]
