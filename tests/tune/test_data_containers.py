"""The same rows from every container, with the line on which each begins; broken files are faults, not crashes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import InvalidDataError, NotFoundError
from tests.tune.samples import chat_rows, message, write_jsonl
from tune.data import rows as rows_module
from tune.data.containers import open_source
from tune.data.datafile import open_data
from tune.data.faults import RowFault
from tune.data.json_array import split_array
from tune.data.rows import ChatRow

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"messages": [message("user", "Go"), {"role": "assistant", "tool_calls": [CALL]}]}
ROWS: list[dict[str, Any]] = [*chat_rows(5), CALLING, {"messages": [*chat_rows(1)[0]["messages"]]}]


def write_array(path: Path) -> Path:
    path.write_text(json.dumps(ROWS), "utf-8")
    return path


def write_csv(path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages"])
        writer.writerows([json.dumps(row["messages"])] for row in ROWS)
    return path


def dataset() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(ROWS)


def write_parquet(path: Path) -> Path:
    dataset().to_parquet(path)
    return path


def write_saved(path: Path) -> Path:
    dataset().save_to_disk(path, num_shards=2)
    return path


def write_shuffled(path: Path) -> Path:
    """Chosen rows, which datasets writes flat."""
    import datasets

    doubled = datasets.concatenate_datasets([dataset(), dataset()])
    doubled.select(range(len(ROWS), 2 * len(ROWS))).save_to_disk(path)
    return path


def write_folder(path: Path) -> Path:
    path.mkdir()
    write_jsonl(path / "a.jsonl", ROWS[:3])
    import datasets

    datasets.Dataset.from_list(ROWS[3:]).to_parquet(path / "b.parquet")
    (path / "README.md").write_text("no data")
    return path


CONTAINERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "jsonl": ("rows.jsonl", lambda path: write_jsonl(path, ROWS)),
    "json": ("rows.json", write_array),
    "json lines": ("lines.json", lambda path: write_jsonl(path, ROWS)),
    "csv": ("rows.csv", write_csv),
    "parquet": ("rows.parquet", write_parquet),
    "array without a suffix": ("file-1", write_array),
    "parquet without a suffix": ("file-2", write_parquet),
    "saved dataset": ("saved", write_saved),
    "saved selection": ("chosen", write_shuffled),
    "folder": ("folder", write_folder),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    filename, write = CONTAINERS[name]
    expected = [row for _, row in open_data(write_jsonl(tmp_path / "expected.jsonl", ROWS)).rows()]
    file = open_data(write(tmp_path / filename))
    read = [row for _, row in file.rows()]
    assert [(row.messages, row.trained) for row in read if isinstance(row, ChatRow)] == [
        (row.messages, row.trained) for row in expected if isinstance(row, ChatRow)
    ]
    assert len(file.sha256()) == 64


def lines_and_faults(path: Path) -> list[tuple[int, str]]:
    return [(line, row.message if isinstance(row, RowFault) else "") for line, row in open_data(path).rows()]


def test_rows_of_an_array_begin_on_the_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    good = json.dumps(chat_rows(1)[0])
    path.write_text(f"[\n{good},\n\n{good}, 3,\n{{\n'a'\n}},\n{{\"messages\": NaN}}, ,{good}\n]\n")
    found = lines_and_faults(path)
    assert [line for line, _ in found] == [2, 4, 4, 5, 8, 8, 8]
    assert [bool(reason) for _, reason in found] == [False, False, True, True, True, True, False]
    assert "must be a JSON object, got a number" in found[2][1]
    assert "nothing stands between two commas" in found[5][1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"messages": []}', "does not end"),
        ('[{"messages": []}] x', "something follows"),
        ('[{"messages": []}}', "too many"),
        ('[{"text": "abc', "does not end"),
    ],
)
def test_a_broken_array_is_a_fault_after_its_whole_rows(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert reason in lines_and_faults(path)[-1][1]


json_objects = st.dictionaries(st.text(max_size=6), st.text(max_size=6) | st.lists(st.text(max_size=4)), max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.lists(json_objects, max_size=6), st.sampled_from([None, 1, 3]), st.booleans())
def test_an_array_is_cut_as_the_json_module_reads_it(
    tmp_path_factory: pytest.TempPathFactory, objects: list[Any], indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("array") / "rows.json"
    path.write_text(json.dumps(objects, indent=indent, ensure_ascii=ascii_only), "utf-8")
    with path.open("rb") as file, pytest.MonkeyPatch.context() as patched:
        patched.setattr("tune.data.json_array._CHUNK_BYTES", 7)  # every border falls somewhere inside
        cut = [raw for _, raw in split_array(file)]
    assert [json.loads(raw) for raw in cut if isinstance(raw, bytes)] == objects


def test_a_huge_element_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 200)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": "x" * 1000}]))
    assert "longer than 200 bytes" in lines_and_faults(path)[-1][1]


def test_csv_rows_begin_on_their_lines_and_bad_ones_are_faults(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes('prompt,completion\n"a\nb",c\nx,"y,z"\nonly one\n\n,e\nd,"\xff"\nlast,row\n'.encode("latin-1"))
    assert [(line, reason.partition(": ")[2][:24]) for line, reason in lines_and_faults(path)] == [
        (2, ""),
        (4, ""),
        (5, "the row has 1 cells, the"),
        (6, "the line is blank; remov"),
        (7, "prompt is empty"),
        (8, "completion is not UTF-8"),
        (9, ""),
    ]


def test_csv_column_names_must_be_there_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,prompt\na,b\n")
    assert "must name every column once" in lines_and_faults(path)[0][1]


def test_a_fault_in_a_folder_names_its_file_and_the_line_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", chat_rows(3))
    (tmp_path / "b.jsonl").write_bytes(json.dumps(chat_rows(1)[0]).encode() + b"\n{}x\n")
    (line, reason) = lines_and_faults(tmp_path)[-1]
    assert line == 5
    assert reason.startswith("line 5: b.jsonl: line 2: not valid JSON")


def test_text_files_of_a_folder_are_one_document_each(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"Tale {name}.\n\nIts end.")
    file = open_data(tmp_path, purpose="cpt")
    assert [getattr(row, "text", None) for _, row in file.rows()] == [
        "Tale one.\n\nIts end.",
        "Tale two.\n\nIts end.",
    ]


def test_a_folder_of_splits_asks_for_one_of_them(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": dataset(), "test": dataset()}).save_to_disk(tmp_path / "all")
    with pytest.raises(InvalidDataError, match=r"holds the splits \['train', 'test'\]; name one of them"):
        open_source(tmp_path / "all")
    assert len(lines_and_faults(tmp_path / "all" / "train")) == len(ROWS)
    (tmp_path / "none").mkdir()
    with pytest.raises(InvalidDataError, match="holds no data files"):
        open_source(tmp_path / "none")
    with pytest.raises(NotFoundError):
        open_source(tmp_path / "nothing.parquet")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_damaged_columnar_file_is_a_fault(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"PAR1" + b"\0" * 100)
    ((line, reason),) = lines_and_faults(path)
    assert line == 1
    assert "not a valid" in reason


def test_values_that_only_columns_know_are_refused_by_name(tmp_path: Path) -> None:
    import datetime

    import datasets

    rows = [{"prompt": "When?", "completion": datetime.datetime(2026, 1, 1)}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    ((_, reason),) = lines_and_faults(tmp_path / "rows.parquet")
    assert "must be two texts or two lists of messages, got str and datetime" in reason
