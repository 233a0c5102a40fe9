"""Memory does not grow with the data: a process that reads many rows needs what one that reads few needs.

The long form (CAPO_LONG=1) reads 1,000,000 rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.errors import StorageError
from tests.sizes import size
from tests.tune.samples import chat_rows, write_jsonl
from tune.data.batches import EpochPlan, StagePlan, plan_epoch
from tune.data.dataset import DatasetReader, ReadOptions, held_out_mask, remove_stores
from tune.data.examples import Examples
from tune.data.mask import Example
from tune.data.store import EncodedRow, StoredRows, StoreWriter, open_store

FEW, MANY = 1_000, size(40_000, 1_000_000)
INDEX_BYTES = 120
"""A row may cost so much memory: its place, length, line and order of visit, and what planning holds for a moment."""
SPARE_KIB = 8_000
READ_AND_PLAN = """
import resource, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
import numpy as np
from tune.data.batches import StagePlan, plan_epoch
from tune.data.dataset import DatasetReader, held_out_mask
from tune.data.examples import Examples

words = {word: number for number, word in enumerate(["<|end|>", "<|user|>", "<|bot|>", "word", "?"])}
core = Tokenizer(models.WordLevel(words, unk_token="word"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
tokenizer.chat_template = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|bot|>' }}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
path = Path(sys.argv[1])
store = path.parent / "store"
reader = DatasetReader(tokenizer, kind=sys.argv[2], max_length=64, over_length="refuse", store_dir=store)
rows, account = reader.read(path, shown_as=path)
held_out = held_out_mask(rows, 0.01, 7)
examples = Examples([rows], ~held_out)

def sequences_of(epoch):
    return plan_epoch(examples.sources, [1.0], examples.lengths, pack_tokens=None, seed=7, epoch=epoch)

steps = StagePlan(
    sequences_of, [len(examples)] * 3, micro_batch_size=8, gradient_accumulation_steps=2, lengths=examples.lengths
)
trained = 0
for number in range(0, len(steps), max(1, len(steps) // 500)):
    for micro_batch in steps[number].micro_batches:
        for (index,) in micro_batch:
            trained += examples[index].num_trained
assert trained > 0
print(account.rows_used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_rows(path: Path, kind: str, number: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            text = f"word {index} " + "word " * (index % 7 + 1)
            chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text + "word"}]
            file.write(json.dumps({"messages": chat} if kind == "sft" else {"text": text}) + "\n")
    return path


def peak_kib(directory: Path, kind: str, number: int) -> int:
    """Resident memory at its highest of a process that reads, plans and draws."""
    directory.mkdir()
    path = write_rows(directory / "rows.jsonl", kind, number)
    command = [sys.executable, "-W", "ignore", "-c", READ_AND_PLAN, str(path), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    rows_used, peak = map(int, done.stdout.split())
    assert rows_used == number
    return peak


@pytest.mark.parametrize("kind", ["sft", "cpt"])
def test_a_large_file_needs_the_memory_of_a_small_one_and_an_index(tmp_path: Path, kind: str) -> None:
    few = peak_kib(tmp_path / "few", kind, FEW)
    many = peak_kib(tmp_path / "many", kind, MANY)
    assert many - few < (MANY - FEW) * INDEX_BYTES / 1024 + SPARE_KIB


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", chat_rows(20))


def reader(tokenizer: Any, store_dir: Path | None = None, **changes: Any) -> DatasetReader:
    return DatasetReader(
        tokenizer, **({"kind": "sft", "max_length": 64, "over_length": "truncate", "store_dir": store_dir} | changes)
    )


def ids_of(rows: StoredRows) -> list[list[int]]:
    return [example.token_ids.tolist() for row in rows for example in row.examples]


def test_rows_come_back_from_disk_as_they_were_encoded(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    written = []
    for line in range(50):
        examples = []
        for _ in range(line % 3 + 1):
            length = int(random.integers(1, 40))
            ids = random.integers(0, 2**31 - 1, length).astype(np.int32)
            examples.append(Example(ids, random.random(length) < 0.5, line))
        written.append(EncodedRow(tuple(examples)))
    with StoreWriter(tmp_path / "store") as writer:
        for row in written:
            writer.append(row)
        rows = StoredRows(writer.finish({}))
    assert [row.digest for row in rows] == [row.digest for row in written]
    assert rows[-1].digest == written[-1].digest
    assert [row.digest for row in rows[3:6]] == [row.digest for row in written[3:6]]
    for stored, given in zip(rows, written, strict=True):
        for one, other in zip(stored.examples, given.examples, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert one.trained.tolist() == other.trained.tolist()
            assert one.line == other.line
    lengths = [len(example.token_ids) for row in written for example in row.examples]
    assert rows.store.lengths.tolist() == lengths


def test_chosen_rows_keep_their_sources_and_lengths(tokenizer: Any, tmp_path: Path) -> None:
    sources = []
    for name, number in (("a", 5), ("b", 3)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", chat_rows(number))
        sources.append(reader(tokenizer).read(path, shown_as=path)[0])
    chosen = np.array([True, False, True, True, False, False, True, True])
    examples = Examples(sources, chosen)
    rows = [row for source in sources for row in source]
    expected = [row.examples[0] for row, is_chosen in zip(rows, chosen, strict=True) if is_chosen]
    assert [example.token_ids.tolist() for example in examples] == [e.token_ids.tolist() for e in expected]
    assert examples.sources.tolist() == [0, 0, 0, 1, 1]
    assert examples.lengths.tolist() == [len(example.token_ids) for example in expected]
    assert len(examples[1:3]) == 2


def test_the_same_file_is_tokenised_once(
    tokenizer: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, account = reader(tokenizer, tmp_path / "store").read(file, shown_as=Path("rows.jsonl"))

    def refuse(*_arguments: object, **_more: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("tune.data.encode.ChatEncoder.encode", refuse)
    again, same = reader(tokenizer, tmp_path / "store").read(file, shown_as=Path("rows.jsonl"))
    assert ids_of(again) == ids_of(first)
    assert same == account
    with pytest.raises(AssertionError, match="tokenised again"):
        reader(tokenizer).read(file, shown_as=file)


def test_another_file_template_or_option_is_tokenised_anew(make_tokenizer: Any, file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"

    def stores() -> int:
        return len(list(store.glob("*/done.json")))

    tokenizer = make_tokenizer()
    reader(tokenizer, store).read(file, shown_as=file)
    assert stores() == 1
    reader(tokenizer, store, max_length=32).read(file, shown_as=file)
    reader(tokenizer, store).read(file, shown_as=file, options=ReadOptions(system_prompt="Be kind."))
    reader(tokenizer, store).read(file, shown_as=file, options=ReadOptions(personal_data="redact"))
    reader(tokenizer, store).read(file, shown_as=file, duplicates={3: "exact_duplicate"})
    reader(make_tokenizer("{# another #}" + tokenizer.chat_template), store).read(file, shown_as=file)
    write_jsonl(file, chat_rows(19))
    reader(tokenizer, store).read(file, shown_as=file)
    assert stores() == 7
    remove_stores(store)
    assert list(store.glob("**/*.bin")) == []


@pytest.mark.parametrize("damage", ["unfinished", "short"])
def test_a_store_that_was_not_finished_or_cut_short_is_made_again(
    tokenizer: Any, file: Path, tmp_path: Path, damage: str
) -> None:
    first, _ = reader(tokenizer, tmp_path / "store").read(file, shown_as=file)
    expected = ids_of(first)
    (directory,) = (tmp_path / "store").iterdir()
    if damage == "unfinished":
        (directory / "done.json").unlink()
    (directory / "tokens.bin").write_bytes(b"")
    assert open_store(directory) is None
    again, _ = reader(tokenizer, tmp_path / "store").read(file, shown_as=file)
    assert ids_of(again) == expected
    (directory / "tokens.bin").write_bytes(b"")
    with pytest.raises(StorageError, match="was cut short"):
        ids_of(again)


def test_a_row_that_stops_reading_leaves_no_finished_store(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*chat_rows(3), {"messages": []}])
    with pytest.raises(ValueError, match="line 4: messages is empty"):
        reader(tokenizer, tmp_path / "store").read(path, shown_as=path)
    assert list((tmp_path / "store").glob("*/done.json")) == []


def test_what_became_of_each_row_is_written_down(tokenizer: Any, tmp_path: Path) -> None:
    rows = chat_rows(4)
    rows[1]["messages"][1]["content"] = "The door is red. " * 40
    rows[2]["messages"][0]["content"] = "The door is red. " * 40
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    reader(tokenizer, tmp_path / "store").read(path, shown_as=path, duplicates={3: "near_duplicate"})
    remove_stores(tmp_path / "store")
    (outcomes,) = (tmp_path / "store").glob("*/rows.jsonl")
    assert [json.loads(line) for line in outcomes.read_text("utf-8").splitlines()] == [
        {"line": 2, "outcome": "truncated"},
        {"line": 3, "outcome": "dropped", "reason": "over_length"},
        {"line": 4, "outcome": "dropped", "reason": "near_duplicate"},
    ]


def test_rows_on_disk_are_held_out_as_rows_in_memory(tokenizer: Any, file: Path) -> None:
    rows, _ = reader(tokenizer).read(file, shown_as=file)
    in_memory = [EncodedRow(row.examples) for row in rows]
    assert held_out_mask(rows, 0.3, seed=5).tolist() == held_out_mask(in_memory, 0.3, seed=5).tolist()


def epoch_plan(number: int, **changes: Any) -> EpochPlan:
    lengths = np.random.default_rng(2).integers(1, 30, number)
    options: dict[str, Any] = {"pack_tokens": None, "seed": 3, "epoch": 0} | changes
    return plan_epoch(np.zeros(number), [1.0], lengths, **options)


def test_a_plan_gives_any_step_without_the_ones_before_it() -> None:
    lengths = np.random.default_rng(2).integers(1, 30, 53)

    def plan() -> StagePlan:
        return StagePlan(
            lambda epoch: epoch_plan(53, epoch=epoch, pack_tokens=30),
            [len(epoch_plan(53, epoch=epoch, pack_tokens=30)) for epoch in range(3)],
            micro_batch_size=2,
            gradient_accumulation_steps=2,
            lengths=lengths,
        )

    in_order = list(plan())
    backwards = plan()
    assert [backwards[number] for number in reversed(range(len(backwards)))] == in_order[::-1]
    visited = [i for step in in_order for batch in step.micro_batches for sequence in batch for i in sequence]
    assert sorted(visited) == sorted([*range(53)] * 3)


def test_a_plan_ends_at_its_last_step_and_within_a_broken_epoch() -> None:
    def plan(sizes: list[int], max_steps: int | None = None) -> StagePlan:
        return StagePlan(
            lambda epoch: epoch_plan(10, epoch=epoch),
            sizes,
            micro_batch_size=4,
            gradient_accumulation_steps=1,
            lengths=[1] * 10,
            max_steps=max_steps,
        )

    assert [len(step.micro_batches[0]) for step in plan([10, 5])] == [4, 4, 2, 4, 1]
    assert len(plan([10, 10], max_steps=4)) == 4
    with pytest.raises(IndexError):
        plan([10], max_steps=2)[2]


def test_grouping_by_length_visits_each_example_once_and_pads_less() -> None:
    lengths = np.random.default_rng(2).integers(1, 30, 1003)

    def padded_tokens(plan: EpochPlan) -> int:
        steps = [[lengths[i] for (i,) in plan[start : start + 8]] for start in range(0, len(plan), 8)]
        return sum(max(step) * len(step) for step in steps)

    plain, grouped = epoch_plan(1003), epoch_plan(1003, grouped_per_step=8)
    assert sorted(grouped) == sorted(plain)
    assert padded_tokens(grouped) < 0.7 * padded_tokens(plain)
    assert grouped != epoch_plan(1003, grouped_per_step=8, epoch=1)
    firsts = [lengths[grouped[start][0]] for start in range(0, 1000, 8)]
    assert firsts != sorted(firsts), "steps are shuffled"


def test_packing_many_examples_keeps_each_once_and_no_pack_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune.data.batches._PACKED_TOGETHER", 100)
    lengths = np.random.default_rng(2).integers(1, 30, 1003)
    plan = epoch_plan(1003, pack_tokens=64)
    assert sorted(i for pack in plan for i in pack) == list(range(1003))
    assert all(sum(lengths[i] for i in pack) <= 64 for pack in plan)
