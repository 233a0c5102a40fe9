"""Write the data that the recipes in ``examples/recipes/modes`` need beside a task's own rows.

    python -m examples.modes.generate

``corpus.jsonl`` is running text about the valley, ``general.jsonl`` chats about anything but the task, and
``preferences.jsonl`` prefers the right answer of the task ``support`` to the answer of another customer's message.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from examples.capo_tiny.dialogues import training_rows
from examples.capo_tiny.narratives import corpus
from examples.tasks.generate import support

HERE = Path(__file__).parent
_SEED = 2  # not that of capo-tiny's own data
_NUM_TEXTS = 240
_NUM_CHATS = 240
_NUM_PAIRS = 160


def preferences(number: int) -> Iterator[dict[str, Any]]:
    """OpenAI's preference rows."""
    rng = random.Random("preferences")
    pairs = support().train
    answers = sorted({pair.answer for pair in pairs})
    for pair in pairs[:number]:
        wrong = rng.choice([answer for answer in answers if answer != pair.answer])
        yield {
            "input": {"messages": [{"role": "user", "content": pair.message}]},
            "preferred_output": [{"role": "assistant", "content": pair.answer}],
            "non_preferred_output": [{"role": "assistant", "content": wrong}],
        }


def write_all(directory: Path) -> None:
    """Write the three files; the same bytes on every machine."""
    directory.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Iterable[Any]] = {
        "corpus": corpus(_NUM_TEXTS, _SEED),
        "general": training_rows(_NUM_CHATS, _SEED),
        "preferences": preferences(_NUM_PAIRS),
    }
    for name, given in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in given]
        (directory / f"{name}.jsonl").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    write_all(HERE)
