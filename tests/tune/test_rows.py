"""Every fault that people put into training files is refused with its line and a reason they can act on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import InvalidDataError, NotFoundError
from serve import conversation_shapes
from tests.tune.samples import chat_rows, message, write_jsonl
from tune.data import rows as rows_module
from tune.data.datafile import open_data
from tune.data.faults import RowFault
from tune.data.formats import AnyRow, parse_object
from tune.data.rows import ChatRow, FileReport, check_rows, decode_object, parse_chat_row

USER, ASSISTANT = message("user", "Hi"), message("assistant", "Hello.")
GOOD = json.dumps({"messages": [USER, ASSISTANT]}).encode()
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def parse_text_row(raw: bytes, line: int) -> AnyRow:
    return parse_object(decode_object(raw, line), line, "text")


def checked(path: Path, parse: Callable[[bytes, int], object] = parse_chat_row) -> FileReport:
    """What an upload is told."""
    return check_rows(path, parse, limit_errors=10)


def rows_of(path: Path) -> list[AnyRow | RowFault]:
    """What training reads."""
    return [row for _, row in open_data(path, purpose="sft", named="chat").rows()]


def chat(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


def calling(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(calls)}


FAULTS: dict[str, tuple[bytes, str]] = {
    "latin-1": ('{"messages": "é"}'.encode("latin-1"), r"not UTF-8 .*byte 14"),
    "utf-16": (GOOD.decode().encode("utf-16-le"), "not valid JSON"),
    "blank line": (b"  ", "blank"),
    "broken JSON": (b'{"messages": [', "not valid JSON: .*character 15"),
    "two objects on a line": (GOOD + GOOD, "not valid JSON: Extra data"),
    "single quotes": (b"{'messages': []}", "not valid JSON"),
    "NaN": (b'{"messages": NaN}', "NaN is not a JSON value"),
    "infinity": (b'{"messages": [-Infinity]}', "-Infinity is not a JSON value"),
    "a number beyond every float": (b'{"messages": [-1e999]}', "the number -1e999 is too large"),
    "integer of 5,000 digits": (b'{"messages": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "a key twice": (b'{"messages": [], "messages": []}', "'messages' is given twice"),
    "array instead of object": (b"[]", "must be a JSON object, got a list"),
    "number instead of object": (b"3", "must be a JSON object, got a number"),
    "null instead of object": (b"null", "must be a JSON object, got null"),
    "deep nesting": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "half a surrogate pair": (chat(message("user", "\ud800"), ASSISTANT), "half a surrogate pair"),
    "no messages": (b"{}", "has no messages"),
    "misspelt key": (b'{"mesages": []}', "unknown key 'mesages'; did you mean 'messages'"),
    "old completion format": (b'{"prompt": "a", "completion": "b"}', "old completion format"),
    "preference row": (b'{"input": {}, "preferred_output": []}', "DPO"),
    "text row in a chat file": (b'{"text": "a"}', "stages of kind cpt"),
    "functions": (chat(USER, ASSISTANT, functions=[{"name": "f"}]), "write tools"),
    "messages is an object": (b'{"messages": {}}', "must be a list"),
    "messages is empty": (chat(), "messages is empty"),
    "message is a string": (chat("Hi", ASSISTANT), r"messages\[0\] must be an object"),
    "no role": (chat({"content": "Hi"}, ASSISTANT), r"messages\[0\] has no role"),
    "unknown role": (chat(message("human", "Hi"), ASSISTANT), 'unknown role "human"; allowed: system'),
    "role is a list": (chat({"role": ["user"], "content": "Hi"}), "unknown role"),
    "unknown key in a message": (chat({**USER, "contents": "x"}, ASSISTANT), "did you mean 'content'"),
    "no content": (chat({"role": "user"}, ASSISTANT), r"messages\[0\].content must be a string.*got null"),
    "content is a number": (chat(message("user", 3), ASSISTANT), r"content must be a string.*got 3"),  # type: ignore[arg-type]
    "empty content": (chat(USER, message("assistant", "")), r"messages\[1\].content is empty"),
    "content is spaces": (chat(USER, message("assistant", " \n")), r"messages\[1\].content is empty"),
    "answer without content": (chat(USER, {"role": "assistant", "content": None}), r"messages\[1\].content is empty"),
    "no parts": (chat({"role": "user", "content": []}, ASSISTANT), r"messages\[0\].content is empty"),
    "image part": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASSISTANT),
        "only text is trained",
    ),
    "part without text": (chat({"role": "user", "content": [{"type": "text"}]}, ASSISTANT), r"content\[0\]"),
    "no assistant": (chat(USER), "no assistant message"),
    "ends with user": (chat(USER, ASSISTANT, USER), "last message must be the assistant's"),
    "starts with a trained answer": (
        chat(ASSISTANT, USER, ASSISTANT),
        r"messages\[0\] is an answer to nothing.*weight 0",
    ),
    "weight 2": (chat(USER, {**ASSISTANT, "weight": 2}), "weight must be 0 or 1, got 2"),
    "weight true": (chat(USER, {**ASSISTANT, "weight": True}), "weight must be 0 or 1, got true"),
    "weight text": (chat(USER, {**ASSISTANT, "weight": "1"}), "weight must be 0 or 1"),
    "weight on user": (chat({**USER, "weight": 1}, ASSISTANT), "unknown key 'weight'"),
    "all weights 0": (chat(USER, {**ASSISTANT, "weight": 0}), "every assistant message has weight 0"),
    "name is a number": (chat({**USER, "name": 3}, ASSISTANT), "name must be a text, got 3"),
    "refusal": (
        chat(USER, {**ASSISTANT, "refusal": "No."}),
        r"messages\[1\].refusal is not trained: only content is; write the text there",
    ),
    "audio": (chat(USER, {**ASSISTANT, "audio": {"id": "a"}}), r"messages\[1\].audio is not trained: only text is"),
    "what no SDK parses": (chat({**USER, "parsed": {"a": 1}}, ASSISTANT), "unknown key 'parsed'"),
    "reasoning is a number": (chat(USER, {**ASSISTANT, "reasoning": 3}), "reasoning must be a text, got 3"),
    "two reasonings": (chat(USER, {**ASSISTANT, "reasoning": "a", "reasoning_content": "b"}), "two names of one text"),
    "reasoning on user": (chat({**USER, "reasoning": "Hm."}, ASSISTANT), "unknown key 'reasoning'"),
    "function_call": (chat(USER, {**ASSISTANT, "function_call": {"name": "f"}}), "write tool_calls"),
    "tool_calls empty": (chat(USER, calling()), r"messages\[1\].content is empty"),
    "tool_calls is an object": (chat(USER, {"role": "assistant", "tool_calls": {"a": 1}}), "must be a list of calls"),
    "call without id": (chat(USER, calling({k: CALL[k] for k in ("type", "function")})), r"tool_calls\[0\].id"),
    "call of another type": (chat(USER, calling({**CALL, "type": "x"})), r"tool_calls\[0\] must be"),
    "call without name": (chat(USER, calling({**CALL, "function": {"arguments": "{}"}})), "function.name"),
    "arguments as object": (
        chat(USER, calling({**CALL, "function": {"name": "f", "arguments": {}}})),
        "JSON object written as a string",
    ),
    "broken arguments": (
        chat(USER, calling({**CALL, "function": {"name": "f", "arguments": "{"}})),
        "arguments is not valid JSON",
    ),
    "arguments as list": (
        chat(USER, calling({**CALL, "function": {"name": "f", "arguments": "[]"}})),
        "must hold a JSON object",
    ),
    "surrogate in arguments": (
        chat(USER, calling({**CALL, "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}})),
        "arguments is not valid JSON",
    ),
    "infinity in arguments": (
        chat(USER, calling({**CALL, "function": {"name": "f", "arguments": '{"a": 1e999}'}})),
        "arguments is not valid JSON: the number 1e999 is too large",
    ),
    "a key twice in arguments": (
        chat(USER, calling({**CALL, "function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}})),
        "arguments is not valid JSON: .*'a' is given twice",
    ),
    "two calls with one id": (chat(USER, calling(CALL, CALL)), "same id"),
    "answer to no call": (
        chat(USER, calling(CALL), {"role": "tool", "content": "x", "tool_call_id": "b"}, ASSISTANT),
        "answers the call 'b', which is not open",
    ),
    "answer without id": (chat(USER, calling(CALL), message("tool", "x"), ASSISTANT), "needs the tool_call_id"),
    "call left open": (chat(USER, calling(CALL), USER, ASSISTANT), r"\['a'\] have no answer"),
    "tools is an object": (chat(USER, ASSISTANT, tools={}), "tools must be a list"),
    "tool with a number for a description": (
        chat(USER, ASSISTANT, tools=[{"type": "function", "function": {"name": "f", "description": 3}}]),
        "description must be a text, got 3",
    ),
    "strict as text": (
        chat(USER, ASSISTANT, tools=[{"type": "function", "function": {"name": "f", "strict": "yes"}}]),
        "strict must be true or false",
    ),
    "tool without function": (chat(USER, ASSISTANT, tools=[{"type": "function"}]), r"tools\[0\] must be"),
    "tool without name": (
        chat(USER, ASSISTANT, tools=[{"type": "function", "function": {}}]),
        r"tools\[0\].function.name",
    ),
    "tool with bad parameters": (
        chat(USER, ASSISTANT, tools=[{"type": "function", "function": {"name": "f", "parameters": []}}]),
        "JSON schema object",
    ),
    "parallel calls forbidden": (
        chat(USER, calling(CALL, {**CALL, "id": "b"}), tools=[TOOL], parallel_tool_calls=False),
        r"parallel_tool_calls is false, but messages\[1\] makes 2 calls",
    ),
    "parallel_tool_calls text": (chat(USER, ASSISTANT, parallel_tool_calls="no"), "must be true or false"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_refused_with_its_line_and_reason(tmp_path: Path, fault: str) -> None:
    raw, reason = FAULTS[fault]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD + b"\n" + raw + b"\n" + GOOD + b"\n")
    report = checked(path)
    (error,) = report.errors
    assert (report.rows, error.line) == (3, 3)
    assert re.match(f"line 3: .*{reason}", error.reason)
    assert [row.message for row in rows_of(path) if isinstance(row, RowFault)] == [error.reason]


@pytest.mark.parametrize(("content", "rows"), [(b"", 0), (b"\n", 0), (b"\xef\xbb\xbf", 0)])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes, rows: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    report = checked(path)
    (error,) = report.errors
    assert (report.rows, error.line) == (rows, 1)
    assert error.reason.startswith("line 1: ")
    assert [row.message for row in rows_of(path) if isinstance(row, RowFault)] == [error.reason]


def test_a_missing_file_is_a_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no data file"):
        checked(tmp_path / "rows.jsonl")


def test_a_huge_line_is_refused_and_the_next_lines_are_still_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 200)
    long_row = chat(message("user", "x" * 1000), ASSISTANT)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + long_row + b"\n" + b"{}\n" + GOOD)
    report = checked(path)
    assert report.rows == 2
    assert [error.line for error in report.errors] == [2, 3]
    assert "longer than 200 bytes" in report.errors[0].reason


def test_a_line_of_exactly_the_limit_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", len(GOOD))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD)
    assert checked(path) == FileReport(rows=2, errors=())


def test_a_report_stops_at_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" * 50)
    assert [error.line for error in check_rows(path, parse_chat_row, limit_errors=4).errors] == [1, 2, 3, 4]


def test_byte_order_mark_windows_newlines_and_a_missing_last_newline_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD)
    assert [row.line for row in rows_of(path) if isinstance(row, ChatRow)] == [1, 2]


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path: Path) -> None:
    row = json.dumps({"messages": [message("user", "a\u2028b\x85c"), ASSISTANT]}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n", encoding="utf-8")
    (read,) = rows_of(path)
    assert isinstance(read, ChatRow)
    assert read.messages[0]["content"] == "a\u2028b\x85c"


def test_several_text_parts_stay_parts_one_becomes_a_text_and_weight_is_taken_out() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    row = parse_chat_row(chat({**USER, "content": parts[:1]}, {"role": "assistant", "content": parts, "weight": 1}), 1)
    answer = {"role": "assistant", "content": parts}
    assert row == ChatRow(1, (message("user", "Hel"), answer), (False, True), None)


ANSWER_OF_F = {"role": "tool", "content": "x", "tool_call_id": "a"}
DUMPED = {"refusal": None, "audio": None, "function_call": None, "annotations": [], "tool_calls": None}
"""What ``message.model_dump()`` of OpenAI's SDK adds to a plain answer."""
NULLS = {"name": None, "weight": None, "tool_calls": None, "tool_call_id": None, "content": None}
"""What ``datasets`` writes where another message of the file has a key."""
ASKS_FOR_NOTHING = {
    "what the SDK dumps": (chat(USER, {**ASSISTANT, **DUMPED}), chat(USER, ASSISTANT)),
    "what litellm dumps": (chat(USER, {**ASSISTANT, "provider_specific_fields": {"a": 1}}), chat(USER, ASSISTANT)),
    "no reasoning": (chat(USER, {**ASSISTANT, "reasoning": "", "reasoning_content": None}), chat(USER, ASSISTANT)),
    "reasoning by its older name": (
        chat(USER, {**ASSISTANT, "reasoning_content": "Hm."}),
        chat(USER, {**ASSISTANT, "reasoning": "Hm."}),
    ),
    "no calls": (chat(USER, {**ASSISTANT, "tool_calls": []}), chat(USER, ASSISTANT)),
    "null for each key of other messages": (
        chat(*({**NULLS, **each} for each in (USER, calling(CALL), ANSWER_OF_F, ASSISTANT))),
        chat(USER, calling(CALL), ANSWER_OF_F, ASSISTANT),
    ),
    "null for each key of other rows": (
        chat(USER, ASSISTANT, tools=None, parallel_tool_calls=None),
        chat(USER, ASSISTANT),
    ),
    "no tools": (chat(USER, ASSISTANT, tools=[], functions=[]), chat(USER, ASSISTANT)),
    "null for the keys of other formats": (
        chat(USER, ASSISTANT, functions=None, input=None, text=None, prompt=None, completion=None),
        chat(USER, ASSISTANT),
    ),
    "what the SDK's helpers have parsed": (
        chat(
            USER,
            {
                **calling({**CALL, "function": {**CALL["function"], "parsed_arguments": {}}, "index": None}),
                "parsed": {"mood": "glad"},
            },
            {**ANSWER_OF_F, "parsed": None},
            {**ASSISTANT, "parsed": None},
        ),
        chat(USER, calling(CALL), ANSWER_OF_F, ASSISTANT),
    ),
    "a call's place in its stream": (
        chat(USER, calling({**CALL, "index": 0}), ANSWER_OF_F, ASSISTANT),
        chat(USER, calling(CALL), ANSWER_OF_F, ASSISTANT),
    ),
    "arguments of a function without parameters": (
        chat(USER, calling({**CALL, "function": {"name": "f", "arguments": ""}}), ANSWER_OF_F, ASSISTANT),
        chat(USER, calling(CALL), ANSWER_OF_F, ASSISTANT),
    ),
}


@pytest.mark.parametrize("what", ASKS_FOR_NOTHING)
def test_what_asks_for_nothing_is_as_if_it_were_not_there(what: str) -> None:
    given, plain = ASKS_FOR_NOTHING[what]
    assert parse_chat_row(given, 1) == parse_chat_row(plain, 1)


TAKEN = {
    "the SDK's whole dump": (USER, {**ASSISTANT, **DUMPED}),
    "the dump of the SDK's parse helper": (USER, {**ASSISTANT, **DUMPED, "parsed": {"mood": "glad"}}),
    "null in a key of the next SDK": ({**USER, "next": None}, {**ASSISTANT, "next": None}),
    "a tool's answer with its name": (USER, calling(CALL), {**ANSWER_OF_F, "name": "f"}, ASSISTANT),
    "a late system message": (USER, ASSISTANT, message("system", "Now French."), USER, ASSISTANT),
    "two system messages": (message("system", "a"), message("system", "b"), USER, ASSISTANT),
    "developer behind system": (message("system", "a"), message("developer", "b"), USER, ASSISTANT),
    "two answers in a row": (USER, ASSISTANT, ASSISTANT),
    "a greeting that is read": ({**ASSISTANT, "weight": 0}, USER, ASSISTANT),
    "an empty question": (message("user", ""), ASSISTANT),
    "an empty system message": (message("system", ""), USER, ASSISTANT),
    "an answer with its reasoning": (USER, {**ASSISTANT, "reasoning": "Hm."}),
    "an empty name": ({**USER, "name": ""}, ASSISTANT),
    "an empty answer that is read": (USER, {"role": "assistant", "content": "", "weight": 0}, USER, ASSISTANT),
}


@pytest.mark.parametrize("what", TAKEN)
def test_a_conversation_that_inference_takes_is_taken_as_a_row(what: str) -> None:
    messages = TAKEN[what]
    asked = [{key: value for key, value in each.items() if key != "weight"} for each in messages]
    conversation_shapes.check({"messages": asked})
    row = parse_chat_row(chat(*messages), 1)
    assert [each["role"] for each in row.messages] == [each["role"] for each in messages]
    assert row.trained[-1]


@pytest.mark.parametrize("ending", [b"\n", b"\n\n", b"\r\n\r\n", b"\n   \n\n", b"\n \t"])
def test_blank_lines_at_the_end_are_no_rows(tmp_path: Path, ending: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD + ending)
    assert checked(path) == FileReport(rows=2, errors=())
    assert [row.line for row in rows_of(path) if isinstance(row, ChatRow)] == [1, 2]


def test_blank_lines_between_rows_are_faults_on_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + GOOD + b"\n \n\n" + GOOD + b"\n\n")
    report = checked(path)
    assert (report.rows, [error.line for error in report.errors]) == (2, [1, 3, 4])


def test_a_whole_tool_conversation_reaches_the_template_with_decoded_arguments() -> None:
    calls = calling({**CALL, "function": {"name": "f", "arguments": '{"x": [1, 2]}'}}, {**CALL, "id": "b"})
    answers = [{"role": "tool", "content": "", "tool_call_id": name} for name in ("b", "a")]
    row = parse_chat_row(chat(USER, calls, *answers, ASSISTANT, tools=[TOOL], parallel_tool_calls=True), 1)
    assert row.messages[1]["content"] == []
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": [1, 2]}
    assert row.trained == (False, True, False, False, True)
    assert row.tools == (TOOL,)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{}", "text must be a string"),
        (b'{"text": ""}', "text is empty"),
        (b'{"text": 3}', "text must be a string"),
        (b'{"txt": "a"}', "did you mean 'text'"),
        (GOOD, "unknown key 'messages'"),
    ],
)
def test_text_rows_have_their_own_faults(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "A tale."}\n' + raw)
    (error,) = checked(path, parse_text_row).errors
    assert error.line == 2
    assert re.match(f"line 2: .*{reason}", error.reason)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "developer", "human"])
call_values = st.fixed_dictionaries(
    {}, optional={"id": json_values, "type": st.just("function"), "function": json_values}
)
fuzzed_messages = st.fixed_dictionaries(
    {"role": roles | json_values},
    optional={
        "content": st.text(max_size=5) | json_values,
        "weight": st.sampled_from([0, 1]) | json_values,
        "tool_calls": st.lists(call_values | st.just(CALL), max_size=2) | json_values,
        "tool_call_id": st.just("a") | json_values,
        "name": json_values,
    },
)
fuzzed_rows = st.fixed_dictionaries(
    {"messages": st.lists(fuzzed_messages, max_size=5) | json_values},
    optional={"tools": json_values, "extra": json_values},
)


def refusal_of(parse: Callable[[bytes, int], object], raw: bytes) -> InvalidDataError | None:
    try:
        parse(raw, 5)
    except InvalidDataError as error:
        return error
    return None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | fuzzed_rows.map(lambda row: json.dumps(row).encode()))
def test_no_input_raises_anything_but_a_data_error(raw: bytes) -> None:
    for parse in (parse_chat_row, parse_text_row):
        error = refusal_of(parse, raw)
        if error is not None:
            assert error.line == 5
            assert error.message.startswith("line 5: ")
            error.message.encode("utf-8")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip)), min_size=1))
def test_good_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[str, str]]
) -> None:
    messages = [m for ask, answer in turns for m in (message("user", ask), message("assistant", answer))]
    row = parse_chat_row(json.dumps({"messages": messages}).encode(), 1)
    assert list(row.messages) == messages
    assert row.trained == (False, True) * len(turns)


def test_a_key_given_twice_is_found_at_once_among_very_many_keys() -> None:
    """Comparing every key with every other takes more than ten seconds here."""
    keys = ", ".join(f'"k{number}": 0' for number in range(50_000))
    started = time.process_time()
    error = refusal_of(parse_chat_row, f'{{{keys}, "k49999": 1}}'.encode())
    assert error is not None
    assert "'k49999' is given twice" in error.message
    assert time.process_time() - started < 2.0


def test_a_big_file_is_streamed(tmp_path: Path) -> None:
    """50 MB of rows are checked in a process that may use 60 MB more than the interpreter needs."""
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))
    big = tmp_path / "big.jsonl"
    with big.open("wb") as file:
        for _ in range(50):
            file.write(b" " * 900_000 + path.read_bytes())
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tune.data.rows import check_rows, parse_chat_row\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "report = check_rows(Path(sys.argv[1]), parse_chat_row, limit_errors=10)\n"
        "assert (report.rows, report.errors) == (400, ()), report\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(big)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000, f"{done.stdout} KiB"


@pytest.mark.parametrize("module", ["tune.recipe", "tune.choices", "tune.data.rows", "tune.progress", "tune.observers"])
def test_what_the_http_process_imports_pulls_in_no_training_stack(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
