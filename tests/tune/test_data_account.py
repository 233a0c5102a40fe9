"""``capo data check``: what was planted is found, on its line, and nothing else is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from capo.cli.data import app
from registry.errors import InvalidRequestError
from tests.sizes import size
from tests.tune.planted import FAULTY, WARNED, Planted, plant
from tests.tune.samples import chat_rows, message, write_jsonl
from tune.data.account import Account, check_data
from tune.data.report import as_json
from tune.data.tokenizer import load_tokenizer

CAPO_TINY = Path(__file__).resolve().parents[2] / "registry" / "models" / "capo-tiny"
ROWS = size(5_000, 100_000)
MANY_ROWS = size(1_500, 1_000_000)
SECONDS = 60.0
BYTES = 1_000_000_000


class PeakMemory:
    """Of this process and the children it gets, each shared page counted once (proportional set size)."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()

    @contextmanager
    def measured(self) -> Iterator[None]:
        thread = threading.Thread(target=self._sample)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        others = set(me.children(recursive=True))  # the service that other tests share is one
        while not self._done.wait(0.2):
            total = 0
            for process in {me, *me.children(recursive=True)} - others:
                try:
                    total += process.memory_full_info().pss
                except psutil.NoSuchProcess:
                    continue
            self.bytes = max(self.bytes, total)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"), ROWS)


@pytest.fixture(scope="module")
def checked(planted: Planted) -> tuple[Account, float, int]:
    """The account, how many seconds it took, and the memory at its peak."""
    tokenizer = load_tokenizer(CAPO_TINY)
    peak = PeakMemory()
    before = psutil.Process().memory_full_info().pss
    started = time.perf_counter()
    with peak.measured():
        account = check_data([planted.path], validation=planted.validation, tokenizer=tokenizer, max_tokens=1024)
    # The test process holds other tests' libraries; what a bare one holds is transformers and torch, about 480 MB.
    return account, time.perf_counter() - started, peak.bytes - before + 480_000_000


def test_more_than_forty_kinds_of_faults_are_planted(planted: Planted) -> None:
    assert len(FAULTY) + len(WARNED) > 40
    assert set(planted.faults.values()) == set(FAULTY)


def test_every_planted_fault_is_found_on_its_line_and_nothing_else(
    planted: Planted, checked: tuple[Account, float, int]
) -> None:
    found = [finding.line for finding in checked[0].faults]
    assert sorted(found) == sorted(planted.faults)
    assert not checked[0].may_train


def test_every_planted_oddity_is_found_as_what_it_is_and_nothing_else(
    planted: Planted, checked: tuple[Account, float, int]
) -> None:
    found = [(Path(finding.file).name, finding.line, finding.kind) for finding in checked[0].warnings]
    assert len(found) == len(set(found))
    assert set(found) == planted.warnings


def test_every_row_is_used_truncated_dropped_or_faulty(planted: Planted, checked: tuple[Account, float, int]) -> None:
    training, validation = checked[0].files
    lost = [finding for finding in checked[0].warnings if "no trained token lies within" in finding.reason]
    cut = [finding for finding in checked[0].warnings if "it would be cut" in finding.reason]
    assert (training.rows, training.faulty_rows) == (ROWS, len(planted.faults))
    assert (training.dropped_rows, training.truncated_rows) == (len(lost), len(cut))
    assert training.used_rows == ROWS - len(planted.faults) - len(lost)
    assert (validation.rows, validation.used_rows) == (100, 100)


def test_checking_stays_within_a_minute_and_a_gigabyte(checked: tuple[Account, float, int]) -> None:
    _, seconds, peak_bytes = checked
    assert seconds < SECONDS
    assert peak_bytes < BYTES


@pytest.mark.timeout(3600)
def test_many_rows_are_checked_in_the_memory_of_an_index(tmp_path: Path) -> None:
    path, validation = tmp_path / "many.jsonl", tmp_path / "validation.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(MANY_ROWS):
            question, answer = f"What is {number} plus one, and what comes after it?", f"It is {number + 1}, dear."
            file.write(json.dumps(chats(("user", question), ("assistant", answer))) + "\n")
    last = path.read_text("utf-8").splitlines(keepends=True)[-10:]
    validation.write_text("".join(last), "utf-8")
    peak = PeakMemory()
    before = psutil.Process().memory_full_info().pss
    with peak.measured():
        account = check_data([path], validation=validation)
    assert [file.rows for file in account.files] == [MANY_ROWS, 10]
    assert [(Path(found.file).name, found.line, found.reason.rsplit(" ", 1)[1]) for found in account.warnings] == [
        ("validation.jsonl", line, str(MANY_ROWS - 10 + line)) for line in range(1, 11)
    ]
    assert peak.bytes - before < 200_000_000 + 250 * MANY_ROWS, "an index, beside what the processes hold"


def chats(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [message(role, content) for role, content in turns]}


def test_the_counts_are_those_of_a_file_counted_by_hand(tmp_path: Path, tokenizer: Any) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "f"}}
    first = chats(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."))
    second = {
        "messages": [
            message("user", "Hi"),
            message("assistant", "Hello.", weight=0),
            message("user", "And?"),
            {"role": "assistant", "content": "f", "tool_calls": [call]},
        ],
        "tools": [tool],
    }
    path = write_jsonl(tmp_path / "rows.jsonl", [first, second, {"messages": []}])
    account = check_data([path])
    (file,) = account.files
    assert (file.rows, file.faulty_rows, file.format, file.container) == (3, 1, "chat", "jsonl")
    assert account.roles == {"system": 1, "user": 3, "assistant": 3}
    assert account.turns == {1: 1, 2: 1}
    assert (account.rows_with_system, account.rows_with_tools, account.tool_calls) == (1, 1, 1)
    assert account.messages_with_weight_0 == 1
    counted = check_data([write_jsonl(tmp_path / "one.jsonl", [first])], tokenizer=tokenizer, max_tokens=100)
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text + "Hello.<|im_end|>\n")["input_ids"]
    assert counted.files[0].total_tokens == len(ids) == counted.quantile(0.5)
    assert counted.files[0].trained_tokens == len(tokenizer("Hello.<|im_end|>")["input_ids"])


def test_a_file_of_mixed_formats_is_refused_on_the_line_where_they_part(tmp_path: Path) -> None:
    alpaca = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in range(12)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*alpaca, chat_rows(1)[0], *alpaca])
    (fault,) = check_data([path]).faults
    assert (fault.line, fault.kind) == (13, "mixed_formats")
    assert "this is a chat row in a alpaca file" in fault.reason


run: Callable[..., Any] = CliRunner().invoke


def test_the_command_says_by_its_exit_code_whether_the_files_may_train(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", chat_rows(20))
    bad = write_jsonl(tmp_path / "bad.jsonl", [*chat_rows(20), {"messages": []}])
    assert run(app, ["check", str(good)]).exit_code == 0
    result = run(app, ["check", str(bad)])
    assert result.exit_code == 1
    assert "bad.jsonl line 21: messages is empty" in result.output
    assert "may train: no, 1 rows have faults" in result.output


def test_the_terminal_shows_the_first_of_each_kind_and_the_file_has_all(tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": []}] * 30)
    whole = tmp_path / "account.json"
    result = run(app, ["check", str(bad), "--json", str(whole), "--shown", "2"])
    assert "messages_shape: 30" in result.output
    assert result.output.count("messages is empty") == 2
    assert "and 28 more" in result.output
    account = json.loads(whole.read_text("utf-8"))
    assert [finding["line"] for finding in account["faults"]] == list(range(1, 31))
    assert (account["may_train"], account["faults_by_kind"]) == (False, {"messages_shape": 30})


@pytest.mark.parametrize("place", ["no-such-directory/account.json", "."])
def test_an_account_that_cannot_be_written_is_shown_all_the_same(tmp_path: Path, place: str) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", chat_rows(20))
    result = run(app, ["check", str(good), "--json", str(tmp_path / place)])
    assert "may train: yes" in result.output
    assert isinstance(result.exception, InvalidRequestError)
    assert str(tmp_path / place) in result.exception.message


def test_several_files_are_sources_whose_shares_are_told(tmp_path: Path) -> None:
    three = write_jsonl(tmp_path / "three.jsonl", chat_rows(30))
    one = write_jsonl(tmp_path / "one.jsonl", [chats(("user", f"Count {n}"), ("assistant", "No")) for n in range(10)])
    result = run(app, ["check", str(three), str(one), "--base", str(CAPO_TINY)])
    assert result.exit_code == 0, result.output
    assert f"{three}: 75.0% of the rows" in result.output
    shares = [file["trained_tokens"] for file in as_json(check_data([three, one]))["files"]]
    assert shares == [0, 0], "no base, no tokens"


def test_a_limit_without_a_base_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(2))
    result = run(app, ["check", str(path), "--max-tokens", "100"])
    assert "--max-tokens needs --base" in str(result.exception)


def test_rows_are_shown_with_their_trained_tokens_marked(tmp_path: Path) -> None:
    rows = [
        chats(("user", "Hi"), ("assistant", "Hello."), ("user", "Sure?"), ("assistant", f"Yes, {n}.")) for n in "abc"
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    result = run(app, ["show", str(path), "--row", "2", "--plain", "--base", str(CAPO_TINY)])
    assert result.exit_code == 0, result.output
    assert (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello.<|im_end|>]]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[[Yes, b.<|im_end|>]]\n"
    ) in result.output
    assert "Yes, a." not in result.output
    assert "no row that begins on line 9" in str(run(app, ["show", str(path), "--row", "9"]).exception)
