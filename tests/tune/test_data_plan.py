"""Packing, epochs, steps and row accounting: numbers only."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidDataError, NotFoundError
from tests.tune.plans import plan_steps
from tests.tune.samples import chat_rows, message, write_jsonl
from tune.data.batches import plan_epoch
from tune.data.dataset import DatasetReader, EncodedRow, count_overlap, held_out_mask
from tune.data.mask import Example
from tune.data.packing import pack_best_fit


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 100))
def test_packing_keeps_every_example_once_and_overfills_no_pack(lengths: list[int], capacity: int) -> None:
    packs = pack_best_fit(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= capacity for pack in packs)
    # No two packs could be one: the mark of any fit that is worth its name.
    sums = sorted(sum(lengths[index] for index in pack) for pack in packs)
    assert len(sums) < 2 or sums[0] + sums[1] > capacity


def test_best_fit_takes_the_fullest_pack_that_has_room() -> None:
    assert pack_best_fit([5, 7, 3, 2, 3], capacity=10) == [[1, 2], [0, 4, 3]]


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=40),
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)
def test_an_epoch_visits_every_example_once(
    lengths: list[int], epoch: int, micro: int, accumulation: int, packed: bool
) -> None:
    sequences = plan_epoch([0] * len(lengths), [1.0], lengths, pack_tokens=20 if packed else None, seed=3, epoch=epoch)
    steps = plan_steps([sequences], micro_batch_size=micro, gradient_accumulation_steps=accumulation, lengths=lengths)
    visited = [i for step in steps for batch in step.micro_batches for sequence in batch for i in sequence]
    assert sorted(visited) == list(range(len(lengths)))
    assert all(len(batch) <= micro for step in steps for batch in step.micro_batches)
    assert all(len(step.micro_batches) <= accumulation for step in steps)


def test_weights_say_how_often_an_epoch_visits_a_source() -> None:
    sources, weights = [0] * 10 + [1] * 8 + [2] * 4, [1.0, 0.25, 2.5]
    drawn = []
    for epoch in range(4):
        sequences = plan_epoch(sources, weights, [1] * 22, pack_tokens=None, seed=1, epoch=epoch)
        counts = Counter(index for (index,) in sequences)
        assert [sum(counts[i] for i in range(22) if sources[i] == s) for s in range(3)] == [10, 2, 10]
        assert all(counts[i] == 1 for i in range(10))
        assert all(counts[i] in (2, 3) for i in range(18, 22))
        drawn.append(tuple(i for i in range(10, 18) if counts[i]))
    assert len(set(drawn)) > 1, "a fraction is drawn anew each epoch"


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    def plan(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return plan_epoch([0] * 30, [1.0], [1] * 30, pack_tokens=None, seed=seed, epoch=epoch)

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1)
    assert plan(1, 0) != plan(2, 0)


def encoded(*contents: int) -> list[EncodedRow]:
    return [EncodedRow((Example(np.array([c, c]), np.array([False, True]), 1),)) for c in contents]


def test_equal_rows_are_held_out_together() -> None:
    rows = encoded(*range(10), *range(10), *range(10))
    is_held = held_out_mask(rows, 0.3, seed=5).tolist()
    assert (len(is_held), sum(is_held)) == (30, 9)
    kept, held = ([row for row, is_out in zip(rows, is_held, strict=True) if is_out is side] for side in (False, True))
    assert count_overlap(kept, held) == 0


def test_what_is_held_out_does_not_depend_on_the_order_of_rows() -> None:
    def held_contents(rows: list[EncodedRow]) -> set[int]:
        return {int(rows[i].examples[0].token_ids[0]) for i in held_out_mask(rows, 0.3, seed=5).nonzero()[0]}

    assert held_contents(encoded(*range(10))) == held_contents(encoded(*reversed(range(10))))


def test_one_different_row_cannot_be_shared_out() -> None:
    with pytest.raises(InvalidDataError, match="at least 2 different rows, got 1"):
        held_out_mask(encoded(3, 3, 3), 0.5, seed=1)


def reader(tokenizer: Any, **changes: Any) -> DatasetReader:
    return DatasetReader(tokenizer, **({"kind": "sft", "max_length": 64, "over_length": "truncate"} | changes))


@pytest.fixture
def mixed_lengths(tmp_path: Path) -> Path:
    """Line 1 fits, line 2 loses the end of its answer, line 3 loses all of it."""
    long_answer = {"messages": [message("user", "Tell me."), message("assistant", "The door is red. " * 30)]}
    long_question = {"messages": [message("user", "The door is red. " * 30), message("assistant", "Yes.")]}
    return write_jsonl(tmp_path / "rows.jsonl", [chat_rows(1)[0], long_answer, long_question])


def test_every_row_is_accounted_for_by_its_line(tokenizer: Any, mixed_lengths: Path) -> None:
    rows, account = reader(tokenizer).read(mixed_lengths, shown_as=Path("rows.jsonl"))
    assert (account.rows_used, account.rows_truncated, account.rows_dropped) == (2, 1, 1)
    assert (account.lines_truncated, account.lines_dropped) == ([2], [3])
    assert account.sentence() == "rows.jsonl: 2 rows used, 1 of them truncated (lines 2), 1 dropped (lines 3)"
    assert max(len(example.token_ids) for row in rows for example in row.examples) == 64


@pytest.mark.parametrize(("rows", "shown"), [(10, "7, 8, 9, 10"), (11, "7, 8, 9, 10, ...")])
def test_only_a_list_of_lines_that_was_cut_ends_in_dots(tokenizer: Any, tmp_path: Path, rows: int, shown: str) -> None:
    answer = {"messages": [message("user", "Tell me."), message("assistant", "The door is red. " * 30)]}
    question = {"messages": [message("user", "The door is red. " * 30), message("assistant", "Yes.")]}
    cut = write_jsonl(tmp_path / "cut.jsonl", [answer] * rows)
    lost = write_jsonl(tmp_path / "lost.jsonl", [*[question] * rows, *chat_rows(1)])
    for path, what in ((cut, "truncated"), (lost, "dropped")):
        _, account = reader(tokenizer).read(path, shown_as=path)
        assert f"{rows} of them {what}" in account.sentence() or f"{rows} {what}" in account.sentence()
        assert f"{shown})" in account.sentence()


def test_over_long_rows_are_dropped_or_refused_where_the_recipe_says_so(tokenizer: Any, mixed_lengths: Path) -> None:
    _, account = reader(tokenizer, over_length="drop").read(mixed_lengths, shown_as=Path("x"))
    assert (account.rows_used, account.rows_truncated, account.rows_dropped) == (1, 0, 2)
    with pytest.raises(InvalidDataError, match=r"line 2: the row has \d+ tokens, max_length is 64") as caught:
        reader(tokenizer, over_length="refuse").read(mixed_lengths, shown_as=Path("x"))
    assert caught.value.line == 2


def test_a_file_in_which_nothing_can_be_trained_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(3))
    with pytest.raises(
        InvalidDataError, match=r"none of the 3 rows of rows\.jsonl has a trained token within 8 tokens"
    ):
        reader(tokenizer, max_length=8).read(path, shown_as=Path("rows.jsonl"))
    with pytest.raises(NotFoundError):
        reader(tokenizer).read(tmp_path / "none.jsonl", shown_as=Path("none.jsonl"))


def test_a_digest_belongs_to_the_file_as_it_is(tokenizer: Any, tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(chat_rows(1)[0]).encode() + b"\r\n")
    _, account = reader(tokenizer).read(path, shown_as=Path("rows.jsonl"))
    assert account.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
