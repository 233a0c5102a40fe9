"""What a recipe asks to be done to its rows, seen in the tokens that training gets and in the account."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.errors import InvalidDataError, InvalidRequestError
from tests.tune.planted import good_row, repeated
from tests.tune.samples import chat_rows, message, text_rows, write_jsonl
from tune.data.dataset import DatasetReader, ReadOptions
from tune.model import BaseShape
from tune.recipe_file import parse_recipe
from tune.stages import ReadyStage, prepare_stage


def prepared(tokenizer: Any, directory: Path, **stage: Any) -> ReadyStage:
    recipe = parse_recipe(
        {"name": "clean", "base_model": "tiny-base", "stages": [{"kind": "sft", "max_length": 256, **stage}]}
    )
    shape = BaseShape(context_tokens=256, hidden_size=64)
    return prepare_stage(recipe, 0, tokenizer=tokenizer, base_shape=shape, recipe_dir=directory)


def texts(tokenizer: Any, examples: Any) -> list[str]:
    return [str(tokenizer.decode(example.token_ids.tolist())) for example in examples]


def visits(ready: ReadyStage) -> list[int]:
    """Examples in the order in which the steps visit them."""
    return [i for step in ready.data.steps for batch in step.micro_batches for sequence in batch for i in sequence]


@pytest.fixture
def repeating(tmp_path: Path) -> Path:
    """Two files of three rows: the second file opens with a near copy and ends with an exact one."""
    random_ = random.Random(4)
    one, two, three = (good_row(random_) for _ in range(3))
    write_jsonl(tmp_path / "first.jsonl", [one, two, three])
    write_jsonl(tmp_path / "second.jsonl", [repeated(two, "near"), good_row(random_), repeated(one, "exact")])
    return tmp_path


SOURCES = [{"path": "first.jsonl"}, {"path": "second.jsonl"}]


@pytest.mark.parametrize(
    ("asked", "dropped"),
    [("keep", {}), ("drop_exact", {"exact_duplicate": 1}), ("drop_near", {"exact_duplicate": 1, "near_duplicate": 1})],
)
def test_duplicates_are_dropped_as_asked_and_counted(
    tokenizer: Any, repeating: Path, asked: str, dropped: dict[str, int]
) -> None:
    ready = prepared(tokenizer, repeating, data=SOURCES, clean={"duplicates": asked})
    assert [account.dropped for account in ready.accounts] == [{}, dropped]
    assert len(ready.data.examples) == 6 - sum(dropped.values())
    assert len(set(visits(ready))) == len(ready.data.examples)
    if dropped:
        assert any("1 exact_duplicate" in note.message for note in ready.notes if note.level == "warn")


def with_mail(number: int) -> dict[str, Any]:
    return {"messages": [message("user", f"Who is {number}?"), message("assistant", f"Ask jo{number}@example.org.")]}


@pytest.mark.parametrize(("asked", "used", "shown"), [("keep", 6, True), ("redact", 6, False), ("drop", 3, False)])
def test_personal_data_is_kept_redacted_or_dropped_as_asked(
    tokenizer: Any, tmp_path: Path, asked: str, used: int, shown: bool
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*chat_rows(3), *(with_mail(n) for n in range(3))])
    ready = prepared(tokenizer, tmp_path, data=[{"path": "rows.jsonl"}], clean={"personal_data": asked})
    (account,) = ready.accounts
    whole = "".join(texts(tokenizer, ready.data.examples))
    assert (account.rows_used, "@example.org" in whole) == (used, shown)
    assert whole.count("Ask [EMAIL].") == (3 if asked == "redact" else 0)
    assert account.rows_redacted == (3 if asked == "redact" else 0)
    assert account.dropped == ({"personal_data": 3} if asked == "drop" else {})


def test_where_cleaning_leaves_nothing_the_reason_is_told(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [with_mail(n) for n in range(3)])
    with pytest.raises(
        InvalidDataError, match=r"no row is left to train on.*3 personal_data; change what clean asks for"
    ):
        prepared(tokenizer, tmp_path, data=[{"path": "rows.jsonl"}], clean={"personal_data": "drop"})


def test_each_source_has_its_own_system_prompt_and_a_rows_own_wins(tokenizer: Any, tmp_path: Path) -> None:
    own = {"messages": [message("system", "Mine."), *chat_rows(1)[0]["messages"]]}
    write_jsonl(tmp_path / "first.jsonl", [*chat_rows(1), own])
    write_jsonl(tmp_path / "second.jsonl", chat_rows(1))
    sources = [{**SOURCES[0], "system_prompt": "Be brief."}, {**SOURCES[1], "system_prompt": "Be kind."}]
    ready = prepared(tokenizer, tmp_path, data=sources)
    systems = [text.split("<|im_end|>")[0] for text in texts(tokenizer, ready.data.examples)]
    assert systems == [f"<|im_start|>system\n{prompt}" for prompt in ("Be brief.", "Mine.", "Be kind.")]
    trained = [tokenizer.decode(e.token_ids[e.trained].tolist()) for e in ready.data.examples]
    assert all(text == "The door is red.<|im_end|>" for text in trained)


def test_a_system_prompt_stands_before_both_answers_of_a_preference_and_before_no_text(
    tokenizer: Any, tmp_path: Path
) -> None:
    pair = write_jsonl(tmp_path / "pair.jsonl", [{"prompt": "Hat?", "chosen": "Yes.", "rejected": "No."}])
    options = ReadOptions(system_prompt="Be kind.")
    reader = DatasetReader(tokenizer, kind="dpo", max_length=64, over_length="refuse")
    ((row,), _) = reader.read(pair, shown_as=pair, options=options)
    assert [text.startswith("<|im_start|>system\nBe kind.<|im_end|>") for text in texts(tokenizer, row.examples)] == [
        True,
        True,
    ]
    text = write_jsonl(tmp_path / "text.jsonl", text_rows(2))
    mixed = DatasetReader(tokenizer, kind="mixed", max_length=64, over_length="refuse")
    with pytest.raises(InvalidRequestError, match=r"system_prompt stands before chats, and text\.jsonl holds texts"):
        mixed.read(text, shown_as=Path("text.jsonl"), options=options)


def test_sources_mix_by_weight_and_general_rows_are_replayed(tokenizer: Any, tmp_path: Path) -> None:
    """A source of weight 0.1 adds a tenth of its rows to every epoch, other ones each time."""
    write_jsonl(tmp_path / "first.jsonl", chat_rows(40))
    general = [{"instruction": f"Count to {n}.", "output": f"It is {n}."} for n in range(100)]
    write_jsonl(tmp_path / "second.jsonl", general)
    sources = [{**SOURCES[0], "weight": 2}, {**SOURCES[1], "weight": 0.1}]
    options = {"epochs": 3, "micro_batch_size": 10, "gradient_accumulation_steps": 1}
    order = visits(prepared(tokenizer, tmp_path, data=sources, **options))
    epochs = [order[start : start + 90] for start in (0, 90, 180)]
    assert len(order) == 270
    for epoch in epochs:
        assert sorted(i for i in epoch if i < 40) == sorted([*range(40)] * 2)
    drawn = [{i for i in epoch if i >= 40} for epoch in epochs]
    assert [len(rows) for rows in drawn] == [10, 10, 10]
    assert len(drawn[0] | drawn[1] | drawn[2]) > 20


def test_a_share_is_held_out_by_seed_and_counted_by_source(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "first.jsonl", chat_rows(40))
    write_jsonl(tmp_path / "second.jsonl", [with_mail(n) for n in range(20)])
    first, again = (prepared(tokenizer, tmp_path, data=SOURCES, validation={"share": 0.05}) for _ in range(2))
    assert len(first.data.validation) == 3
    held = texts(tokenizer, first.data.validation)
    assert held == texts(tokenizer, again.data.validation)
    assert not set(held) & set(texts(tokenizer, first.data.examples))
    assert sum(account.rows_held_out for account in first.accounts) == 3
    assert sum(account.rows_used for account in first.accounts) == 60


def test_a_validation_file_that_repeats_training_rows_is_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "first.jsonl", chat_rows(20))
    write_jsonl(tmp_path / "second.jsonl", [*chat_rows(4), with_mail(1)])
    ready = prepared(tokenizer, tmp_path, data=SOURCES[:1], validation={"path": "second.jsonl"})
    assert any("4 of 5 validation rows are also training rows" in note.message for note in ready.notes)


def test_steps_of_similar_length_are_made_where_asked(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"messages": [message("user", "Hi"), message("assistant", "The door is red. " * (n % 9 + 1))]}
        for n in range(90)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {"data": [{"path": "rows.jsonl"}], "epochs": 1, "micro_batch_size": 5, "gradient_accumulation_steps": 2}

    def padding(ready: ReadyStage) -> int:
        batches = [
            [len(ready.data.examples[i].token_ids) for (i,) in b] for s in ready.data.steps for b in s.micro_batches
        ]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    plain, grouped = (prepared(tokenizer, tmp_path, **options, group_by_length=on) for on in (False, True))
    assert sorted(visits(grouped)) == sorted(visits(plain)) == list(range(90))
    assert padding(grouped) < 0.5 * padding(plain)


def test_texts_are_cleaned_and_packed_too(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*text_rows(30), {"text": "Write to jo@example.org."}, *text_rows(1)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    ready = prepared(
        tokenizer,
        tmp_path,
        kind="cpt",
        data=[{"path": "rows.jsonl"}],
        clean={"duplicates": "drop_exact", "personal_data": "redact"},
    )
    (account,) = ready.accounts
    assert (account.rows_used, account.rows_redacted, account.dropped) == (31, 1, {"exact_duplicate": 1})
    packs = [sequence for step in ready.data.steps for batch in step.micro_batches for sequence in batch]
    assert sorted(i for pack in packs for i in pack) == list(range(31))
    assert max(len(pack) for pack in packs) > 3
    ends = [int(example.token_ids[-1]) for example in ready.data.examples]
    assert ends == [tokenizer.eos_token_id] * 31, "a separator ends every document"
    assert np.mean([len(pack) for pack in packs]) > 3


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"data": [{"path": "x", "format": "text"}]}, "kind sft reads chat, .*, not format=text"),
        ({"kind": "cpt", "data": [{"path": "x", "system_prompt": "a"}]}, "a cpt stage reads texts"),
        ({"kind": "cpt", "data": [{"path": "x", "format": "chat"}]}, "kind cpt reads text, not format=chat"),
        ({"data": [{"path": "x"}], "packing": True, "group_by_length": True}, "packing=true leaves nothing to pad"),
        ({"data": [{"path": "x", "format": "alpacca"}]}, "'alpaca'"),
        ({"data": [{"path": "x"}], "clean": {"duplicates": "drop"}}, "'drop_exact' or 'drop_near'"),
    ],
)
def test_data_options_that_do_not_fit_are_refused(tmp_path: Path, stage: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        prepared(None, tmp_path, **stage)


class TestValidationFiles:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        plain = [{"messages": [message("user", "hi"), message("assistant", f"write to a{n}@b.org")]} for n in range(5)]
        write_jsonl(tmp_path / "train.jsonl", [row | {"id": number} for number, row in enumerate(plain)])
        write_jsonl(tmp_path / "valid.jsonl", [row | {"id": number, "by": "x"} for number, row in enumerate(plain[:2])])
        return tmp_path

    def test_their_rows_look_like_training_rows(self, tokenizer: Any, directory: Path) -> None:
        ready = prepared(
            tokenizer,
            directory,
            data=[{"path": "train.jsonl", "system_prompt": "Be brief.", "ignored_keys": ["id", "by"]}],
            clean={"personal_data": "redact"},
            validation={"path": "valid.jsonl"},
        )
        trained, held = texts(tokenizer, ready.data.examples), texts(tokenizer, ready.data.validation)
        assert held == trained[:2], "the same rows, from another file"
        assert "Be brief." in held[0]
        assert "a0@b.org" not in held[0]
        assert ready.accounts[-1].rows_redacted == 2
        assert any("valid.jsonl has system_prompt='Be brief.'" in note.message for note in ready.notes)
        assert ready.stage.validation is not None
        assert ready.stage.validation.ignored_keys == ("id", "by"), "which the manifest then holds"

    def test_the_recipe_may_say_otherwise(self, tokenizer: Any, directory: Path) -> None:
        data = [{"path": "train.jsonl", "system_prompt": "Be brief.", "ignored_keys": ["id"]}]
        own = {"path": "valid.jsonl", "system_prompt": "", "ignored_keys": ["id", "by"], "format": "chat"}
        held = texts(tokenizer, prepared(tokenizer, directory, data=data, validation=own).data.validation)
        assert len(held) == 2
        assert "Be brief." not in held[0]

    def test_of_two_system_prompts_none_is_guessed(self, tokenizer: Any, directory: Path) -> None:
        data = [{"path": "train.jsonl", "system_prompt": "Be brief."}, {"path": "train.jsonl"}]
        with pytest.raises(InvalidRequestError, match=r"the data have 2 different ones.*validation\.system_prompt"):
            prepared(tokenizer, directory, data=data, validation={"path": "valid.jsonl"})
        with pytest.raises(InvalidRequestError, match="says how path is read"):
            prepared(tokenizer, directory, data=data, validation={"share": 0.1, "system_prompt": "x"})
