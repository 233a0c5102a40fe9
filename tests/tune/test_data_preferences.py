"""Preference rows of every shape become the same pair, and the pair's ids are those of the two chats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InvalidDataError
from tests.tune.samples import LLAMA3, message, write_jsonl
from tests.tune.spans import decode_spans
from tune.data.dataset import DatasetReader
from tune.data.faults import RowFault
from tune.data.mask import ChatEncoder
from tune.data.pairs import Pairs, encode_preference
from tune.data.preferences import PreferenceRow, check_preference_object

ASK, GOOD, BAD = message("user", "Hat?"), message("assistant", "A hat."), message("assistant", "No.")

ONE_PAIR: dict[str, dict[str, Any]] = {
    "openai": {"input": {"messages": [ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    "texts": {"prompt": "Hat?", "chosen": "A hat.", "rejected": "No."},
    "messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "prompt text, answers as messages": {"prompt": "Hat?", "chosen": [GOOD], "rejected": [BAD]},
    "prompt repeated in the answers": {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "prompt implied": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
}


def parsed(row: dict[str, Any]) -> PreferenceRow:
    return check_preference_object(json.loads(json.dumps(row)), 4)


@pytest.mark.parametrize("shape", ONE_PAIR)
def test_every_shape_gives_the_same_pair(shape: str) -> None:
    row = parsed(ONE_PAIR[shape])
    assert row.chosen.messages == (ASK, GOOD)
    assert row.rejected.messages == (ASK, BAD)
    assert row.chosen.trained == row.rejected.trained == (False, True)


def test_tools_and_earlier_answers_of_the_prompt_are_read_and_not_trained() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    given = {"messages": [ASK, GOOD, message("user", "Sure?")], "tools": [tool], "parallel_tool_calls": True}
    row = parsed({"input": given, "preferred_output": [GOOD], "non_preferred_output": [BAD]})
    assert row.chosen.tools == (tool,)
    assert row.chosen.trained == (False, False, False, True)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "equal answers": ({**ONE_PAIR["texts"], "rejected": "A hat."}, "chosen and rejected are equal"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "chosen must be a text or a list|rejected must be"),
    "texts without prompt": ({"chosen": "b", "rejected": "c"}, "do not say where the answer begins"),
    "no parting": ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "do not part"),
    "two messages": ({**ONE_PAIR["messages"], "chosen": [GOOD, ASK]}, "exactly one assistant message, got 2 messages"),
    "user answers": ({**ONE_PAIR["messages"], "rejected": [message("user", "x")]}, "the prompt followed by rejected"),
    "empty answer": ({**ONE_PAIR["texts"], "chosen": ""}, r"followed by chosen: messages\[1\].content is empty"),
    "no input": ({"preferred_output": [GOOD], "non_preferred_output": [BAD]}, "input must be an object"),
    "unknown key": ({**ONE_PAIR["openai"], "score": 1}, "unknown key 'score'"),
    "unknown key of input": (
        {**ONE_PAIR["openai"], "input": {"messages": [ASK], "tool": []}},
        "input: unknown key 'tool'; did you mean 'tools'",
    ),
    "weight 0": ({**ONE_PAIR["messages"], "chosen": [{**GOOD, "weight": 0}]}, "every assistant message has weight 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_pair_is_refused_with_its_line_and_side(name: str) -> None:
    row, reason = WRONG[name]
    with pytest.raises(RowFault, match=f"^line 4: .*({reason})"):
        parsed(row)


def test_both_answers_stand_behind_the_ids_that_serving_makes_of_the_prompt(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(LLAMA3, "<|eot_id|>", "<|begin_of_text|>")
    pair = encode_preference(ChatEncoder(tokenizer), parsed(ONE_PAIR["texts"]))
    prompt = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, return_dict=False)
    assert pair.prompt_token_ids.tolist() == prompt
    for side in (pair.chosen, pair.rejected):
        assert side.token_ids[: len(prompt)].tolist() == prompt
    assert decode_spans(tokenizer, pair.chosen) == ["A hat.<|eot_id|>"]
    assert decode_spans(tokenizer, pair.rejected) == ["No.<|eot_id|>"]


def test_a_preference_file_is_read_as_pairs_that_stay_whole(tokenizer: Any, tmp_path: Path) -> None:
    long_answer = {"prompt": "Hat?", "chosen": "Yes.", "rejected": "The door is red. " * 40}
    lost = {"prompt": "The door is red. " * 40, "chosen": "Yes.", "rejected": "No."}
    path = write_jsonl(tmp_path / "rows.jsonl", [ONE_PAIR["texts"], long_answer, lost])
    reader = DatasetReader(tokenizer, kind="dpo", max_length=64, over_length="truncate")
    rows, account = reader.read(path, shown_as=path)
    assert (account.rows_used, account.rows_truncated, account.rows_dropped) == (2, 1, 1)
    pairs = Pairs([example for row in rows for example in row.examples])
    assert [(pair.chosen.line, pair.rejected.line) for pair in pairs] == [(1, 1), (2, 2)]
    assert decode_spans(tokenizer, pairs[1].chosen) == ["Yes.<|im_end|>"]
    assert len(pairs[1].rejected.token_ids) == 64


def test_a_stage_of_chats_sends_preferences_away(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ONE_PAIR["texts"]])
    reader = DatasetReader(tokenizer, kind="sft", max_length=64, over_length="truncate")
    with pytest.raises(InvalidDataError, match="this is a preference row"):
        reader.read(path, shown_as=path)
