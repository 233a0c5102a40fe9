"""Rows of Parquet and Arrow files, batch by batch, and the folders that ``datasets.save_to_disk`` writes.

Arrow gives every object all keys of its column; what a row does not have is null. Nulls are therefore left out.
pyarrow is imported where it is used: reading JSONL must not cost its start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from registry.errors import InvalidDataError
from tune.data.faults import RowFault, row_fault
from tune.data.rows import JsonObject, open_file

_ROWS_AT_A_TIME = 256
_STATE = "state.json"
DESCRIPTION_FILES = (_STATE, "dataset_info.json", "dataset_dict.json", "dataset_infos.json")
"""Files of a Hugging Face folder that describe the data and hold no rows."""


def saved_dataset_files(folder: Path) -> list[Path] | None:
    """Data files of a folder in the layout of ``datasets.save_to_disk``; ``None`` where it is not one.

    Raises:
        InvalidDataError: several splits, or rows chosen by an index file, which old versions of datasets wrote.
    """
    splits_file = folder / "dataset_dict.json"
    if splits_file.is_file():
        splits = json.loads(splits_file.read_text("utf-8"))["splits"]
        raise InvalidDataError(
            f"{folder} holds the splits {splits}; name one of them, for example {folder / splits[0]}"
        )
    state_file = folder / _STATE
    if not state_file.is_file():
        return None
    state = json.loads(state_file.read_text("utf-8"))
    if state.get("_indices_data_files"):
        raise InvalidDataError(
            f"{folder} keeps its rows behind an index file; load it with datasets, flatten_indices() and save it again"
        )
    return [folder / entry["filename"] for entry in state["_data_files"]]


def parquet_rows(path: Path) -> Iterator[tuple[int, JsonObject | RowFault]]:
    """Rows of a Parquet file, numbered from 1."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with open_file(path) as file, ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=_ROWS_AT_A_TIME):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        yield number + 1, row_fault(number + 1, f"not a valid Parquet file: {error}", "broken_file")


def arrow_rows(path: Path) -> Iterator[tuple[int, JsonObject | RowFault]]:
    """Rows of an Arrow stream file (what datasets writes), numbered from 1."""
    import pyarrow
    from pyarrow import ipc

    number = 0
    try:
        with open_file(path) as file, ipc.open_stream(file) as batches:
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                    for row in batch.slice(start, _ROWS_AT_A_TIME).to_pylist():
                        number += 1
                        yield number, _without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        yield number + 1, row_fault(number + 1, f"not a valid Arrow file: {error}", "broken_file")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
