"""Rows as other tools write them become the same chats; what cannot be one is refused in the words of its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InvalidDataError, InvalidRequestError
from tests.tune.samples import chat_rows, message, text_rows, write_jsonl
from tune.data.datafile import open_data
from tune.data.dataset import DatasetReader
from tune.data.faults import RowFault
from tune.data.formats import AnyRow, Format, detect_format, parse_object
from tune.data.rows import ChatRow, TextRow

ASK, ANSWER = message("user", "What is a hat?"), message("assistant", "A thing for heads.")
CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": {"word": "hat"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def parsed(row: dict[str, Any], form: Format | None = None) -> AnyRow:
    found = form or detect_format(row)
    assert found is not None
    return parse_object(json.loads(json.dumps(row)), 1, found)


ONE_CHAT: dict[str, dict[str, Any]] = {
    "chat": {"messages": [ASK, ANSWER]},
    "prompt-completion": {"prompt": "What is a hat?", "completion": "A thing for heads."},
    "prompt-completion of messages": {"prompt": [ASK], "completion": [ANSWER]},
    "alpaca": {"instruction": "What is a hat?", "input": "", "output": "A thing for heads."},
    "alpaca without input": {"instruction": "What is a hat?", "output": "A thing for heads."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "What is a hat?"}, {"from": "gpt", "value": "A thing for heads."}]
    },
    "sharegpt with OpenAI's keys": {"conversations": [ASK, ANSWER]},
}


@pytest.mark.parametrize("name", ONE_CHAT)
def test_every_chat_format_says_the_same(name: str) -> None:
    assert detect_format(ONE_CHAT[name]) == name.split(" ")[0]
    assert parsed(ONE_CHAT[name]) == ChatRow(1, (ASK, ANSWER), (False, True), None)


def test_a_prompt_of_messages_is_read_and_only_the_completion_is_trained() -> None:
    row = parsed({"prompt": [ASK, ANSWER, message("user", "Why?")], "completion": [message("assistant", "Cold.")]})
    assert isinstance(row, ChatRow)
    assert row.trained == (False, False, False, True)


def test_alpaca_history_system_and_input_take_their_places() -> None:
    given = {
        "instruction": "Sum up.",
        "input": "A long text.",
        "output": "Short.",
        "system": "Be kind.",
        "history": [["Hi", "Hello."]],
    }
    row = parsed(given)
    assert isinstance(row, ChatRow)
    assert row.messages == (
        message("system", "Be kind."),
        message("user", "Hi"),
        message("assistant", "Hello."),
        message("user", "Sum up.\nA long text."),
        message("assistant", "Short."),
    )


def test_sharegpt_tools_and_weights_become_openai_ones() -> None:
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "What is a hat?"},
        {"from": "function_call", "value": '{"name": "look_up", "arguments": {"word": "hat"}}'},
        {"from": "observation", "value": "thing"},
        {"from": "gpt", "value": "A thing.", "weight": 0},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    row = parsed({"conversations": turns, "tools": json.dumps([TOOL["function"]])})
    assert isinstance(row, ChatRow)
    assert row.tools == (TOOL,)
    assert [m["role"] for m in row.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    assert row.messages[2]["tool_calls"][0]["function"] == CALL["function"]
    assert row.messages[3]["tool_call_id"] == row.messages[2]["tool_calls"][0]["id"]
    assert row.trained == (False, False, True, False, False, False, True)


def conversation(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "empty completion": ({"prompt": "a", "completion": " "}, "empty_content", "completion is empty"),
    "completion of another type": ({"prompt": "a", "completion": 3}, "content_type", "two texts or two lists"),
    "completion ends with the user": (
        {"prompt": [ASK], "completion": [ASK]},
        "nothing_to_learn",
        "read as chat messages",
    ),
    "no output": ({"instruction": "a"}, "nothing_to_learn", "no output"),
    "empty output": ({"instruction": "a", "output": ""}, "empty_content", "output is empty"),
    "output of another type": ({"instruction": "a", "output": ["b"]}, "content_type", "output must be a text"),
    "history of single texts": ({"instruction": "a", "output": "b", "history": ["x"]}, "content_type", r"history\[0\]"),
    "unknown alpaca key": ({"instruction": "a", "ouput": "b"}, "unknown_key", "did you mean 'output'"),
    "no turns": ({"conversations": []}, "messages_shape", "at least one turn"),
    "unknown speaker": (conversation(("humam", "a"), ("gpt", "b")), "unknown_role", "did you mean 'human'"),
    "empty value": (conversation(("human", "a"), ("gpt", "")), "empty_content", r"conversations\[1\].value is empty"),
    "value of another type": (conversation(("human", 3)), "content_type", r"conversations\[0\].value"),
    "two humans then nothing": (conversation(("human", "a"), ("human", "b")), "nothing_to_learn", "no assistant"),
    "answer without call": (conversation(("human", "a"), ("observation", "b")), "tool_order", "no function_call"),
    "broken call": (conversation(("human", "a"), ("function_call", "{")), "tool_arguments", "must be the JSON object"),
    "tools with an infinity": (
        conversation(("human", "a"), ("gpt", "b")) | {"tools": '[{"name": "f", "parameters": {"maximum": 1e999}}]'},
        "tool_definition",
        "the number 1e999 is too large",
    ),
    "broken tools": (conversation(("human", "a"), ("gpt", "b")) | {"tools": "["}, "tool_definition", "not valid JSON"),
}


@pytest.mark.parametrize("calls", [[{"x": 1}], [{"id": 3}], ["call_1"], [], 5, {"id": "call_1"}, "call_1"])
def test_an_answer_to_calls_that_are_none_is_a_fault_of_its_line(calls: object) -> None:
    turns = [ASK, {"role": "assistant", "tool_calls": calls}, {"from": "observation", "value": "x"}]
    with pytest.raises(RowFault, match=r"^line 1: conversations\[2\] answers a call") as caught:
        parsed({"conversations": turns})
    assert caught.value.kind == "tool_order"


@pytest.mark.parametrize("name", WRONG)
def test_each_fault_of_a_foreign_row_is_named_in_its_own_words(name: str) -> None:
    row, kind, reason = WRONG[name]
    with pytest.raises(RowFault, match=f"^line 1: .*{reason}") as caught:
        parsed(row)
    assert caught.value.kind == kind
    assert caught.value.code == "invalid_data"


@pytest.mark.parametrize(
    ("rows", "form"),
    [
        (chat_rows(3), "chat"),
        (text_rows(3), "text"),
        ([{"instruction": "a", "output": "b"}], "alpaca"),
        ([{"prompt": "a", "completion": "b"}], "prompt-completion"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "preference"),
        ([conversation(("human", "a"), ("gpt", "b"))], "sharegpt"),
        ([{"nothing": "known"}, {"instruction": "a", "output": "b"}], "alpaca"),
    ],
)
def test_a_file_says_which_format_it_has_and_why(tmp_path: Path, rows: list[Any], form: str) -> None:
    file = open_data(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert file.format == form
    line = 2 if "nothing" in rows[0] else 1
    assert file.sentence() == f"jsonl of {form} rows (by the keys of line {line})"


def test_a_named_format_is_held_to(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(2))
    (_, first), _ = open_data(path, named="alpaca").rows()
    assert isinstance(first, RowFault)
    assert "this is a chat row in a alpaca file" in first.message
    with pytest.raises(InvalidRequestError, match="format='text' holds no rows for sft"):
        open_data(path, named="text", purpose="sft")


@pytest.mark.parametrize(
    ("rows", "purpose", "reason"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "sft", "this is a preference row.*DPO"),
        (chat_rows(1), "dpo", "unknown key 'messages'|this is a chat row"),
        ([{"instruction": "a", "output": "b"}], "cpt", "this is a alpaca row, and cpt reads text"),
    ],
)
def test_rows_for_another_purpose_are_called_so(
    tokenizer: Any, tmp_path: Path, rows: list[Any], purpose: Any, reason: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    reader = DatasetReader(tokenizer, kind=purpose, max_length=64, over_length="truncate")
    with pytest.raises(InvalidDataError, match=f"line 1: .*({reason})"):
        reader.read(path, shown_as=path)


def test_keys_that_training_does_not_read_may_be_left_out_by_name(tmp_path: Path) -> None:
    rows = [{**row, "id": n, "source": "web"} for n, row in enumerate(chat_rows(2))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    (_, refused), _ = open_data(path).rows()
    assert isinstance(refused, RowFault)
    assert "unknown key 'id'" in refused.message
    read = [row for _, row in open_data(path, ignored_keys=("id", "source")).rows()]
    assert [row.line for row in read if isinstance(row, ChatRow)] == [1, 2]


def test_text_rows_stay_texts() -> None:
    assert parsed({"text": "A tale."}) == TextRow(1, "A tale.")
