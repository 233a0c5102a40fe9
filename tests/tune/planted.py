"""A training file in which every fault is known: what was planted on which line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.tune.samples import message
from tests.tune.test_rows import FAULTS

WORDS = tuple(
    f"{start}{middle}{end}"
    for start in ("bar", "con", "del", "for", "gar", "hol", "in", "lin", "mar", "nor", "per", "ster", "tor", "wel")
    for middle in ("a", "e", "i", "o")
    for end in ("den", "ing", "ker", "land", "mer", "son", "ter", "ton", "ver", "well")
)

Row = dict[str, Any]


def sentence(random_: random.Random, number: int) -> str:
    return " ".join(random_.choice(WORDS) for _ in range(number)).capitalize() + "."


def good_row(random_: random.Random) -> Row:
    return {"messages": [message("user", sentence(random_, 11)), message("assistant", sentence(random_, 14))]}


def _with_text(text: str) -> Callable[[random.Random], Row]:
    def make(random_: random.Random) -> Row:
        row = good_row(random_)
        row["messages"][1]["content"] += f" {text} {sentence(random_, 4)}"
        return row

    return make


def _calling(**more: Any) -> Callable[[random.Random], Row]:
    def make(random_: random.Random) -> Row:
        call = {"id": "a", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
        asks = message("user", sentence(random_, 12))
        answers = [
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "", "tool_call_id": "a"},
            message("assistant", sentence(random_, 12)),
        ]
        return {"messages": [asks, *answers], **more}

    return make


def _parrot(random_: random.Random) -> Row:
    text = sentence(random_, 20)
    return {"messages": [message("user", text), message("assistant", text)]}


def _long(question: int, answer: int) -> Callable[[random.Random], Row]:
    return lambda random_: {
        "messages": [message("user", sentence(random_, question)), message("assistant", sentence(random_, answer))]
    }


LOOK_UP = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
WARNED: dict[str, tuple[Callable[[random.Random], Row], str]] = {
    "e-mail": (_with_text("Write to jo.miller@example.org today."), "personal_data"),
    "phone": (_with_text("Call +44 20 7946 0958 now."), "personal_data"),
    "phone at home": (_with_text("Call (212) 555-0187 now."), "personal_data"),
    "card": (_with_text("Pay with 4111 1111 1111 1111 here."), "personal_data"),
    "bank account": (_with_text("Send it to GB82 WEST 1234 5698 7654 32 soon."), "personal_data"),
    "social security number": (_with_text("Mine is 536-90-4399 still."), "personal_data"),
    "address": (_with_text("Look at 8.8.8.8 there."), "personal_data"),
    "control character": (_with_text("A bell \x07 rang."), "control_character"),
    "lost characters": (_with_text("A caf\N{REPLACEMENT CHARACTER} there."), "damaged_text"),
    "special token": (_with_text("It says <|im_end|> there."), "special_token"),
    "parrot": (_parrot, "answer_repeats_question"),
    "empty tool answer": (_calling(tools=[LOOK_UP]), "empty_tool_answer"),
    "too long, cut": (_long(20, 900), "over_length"),
    "too long, lost": (_long(900, 20), "over_length"),
}
"""Rows that can be trained on: how each is made, and as what it is found."""

FAULTY = {name: raw for name, (raw, _) in FAULTS.items() if b"\n" not in raw}
FAULTY |= {
    "sharegpt row": b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
    "alpaca row": b'{"instruction": "a", "output": "b"}',
    "undecodable tool arguments": json.dumps(
        {
            "messages": [
                message("user", "a"),
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1'}}],
                },
            ]
        }
    ).encode(),
}
"""Rows that stop training."""


@dataclass
class Planted:
    path: Path
    validation: Path
    faults: dict[int, str] = field(default_factory=dict)
    """Line -> what was planted there."""
    warnings: set[tuple[str, int, str]] = field(default_factory=set)
    """(file name, line, kind)"""


def plant(directory: Path, rows: int, seed: int = 1) -> Planted:
    """``rows`` good rows with a fault or an oddity about every fiftieth line, and a validation file with overlaps."""
    random_ = random.Random(seed)
    planted = Planted(directory / "train.jsonl", directory / "valid.jsonl")
    kinds: list[tuple[str, str]] = [("fault", name) for name in FAULTY]
    kinds += [("warning", name) for name in WARNED] + [("repeat", "exact"), ("repeat", "near")]
    random_.shuffle(kinds)
    spacing = max(2, min(50, rows // (2 * len(kinds))))
    earlier: list[Row] = []
    with planted.path.open("wb") as file:
        for raw in _lines(planted, random_, kinds, rows, spacing, earlier):
            file.write(raw + b"\n")
    overlapping = iter(random_.sample(earlier, 10))  # each another one: two near copies of one row are exact ones
    with planted.validation.open("w", encoding="utf-8") as text:
        for line in range(1, 101):
            row = good_row(random_)
            if line % 10 == 0:
                how = "exact" if line % 20 else "near"
                row = repeated(next(overlapping), how)
                planted.warnings.add(("valid.jsonl", line, f"{how}_overlap"))
            text.write(json.dumps(row) + "\n")
    return planted


def _lines(
    planted: Planted,
    random_: random.Random,
    kinds: list[tuple[str, str]],
    rows: int,
    spacing: int,
    earlier: list[Row],
) -> Iterator[bytes]:
    repeated_rows: set[int] = set()
    for line in range(1, rows + 1):
        if line % spacing or not earlier:
            row = good_row(random_)
            if line % 7 == 0:
                earlier.append(row)
            yield json.dumps(row).encode()
            continue
        what, name = kinds[line // spacing % len(kinds)]
        if what == "fault":
            planted.faults[line] = name
            yield FAULTY[name]
        elif what == "warning":
            make, kind = WARNED[name]
            planted.warnings.add(("train.jsonl", line, kind))
            yield json.dumps(make(random_)).encode()
        else:
            chosen = random_.randrange(len(earlier))
            while chosen in repeated_rows:  # a near copy of a near copy might be an exact one
                chosen = random_.randrange(len(earlier))
            repeated_rows.add(chosen)
            planted.warnings.add(("train.jsonl", line, f"{name}_duplicate"))
            yield json.dumps(repeated(earlier[chosen], name)).encode()


def repeated(row: Row, how: str) -> Row:
    """The same row again, or with its last word changed."""
    copy: Row = json.loads(json.dumps(row))
    if how == "near":
        content = copy["messages"][1]["content"]
        copy["messages"][1]["content"] = content.rsplit(" ", 1)[0] + " otherwise."
    return copy
