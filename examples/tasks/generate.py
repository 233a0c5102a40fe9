"""Write ``train.jsonl`` and ``held_out.jsonl`` of every task, as OpenAI chat rows.

    python -m examples.tasks.generate

Each task has far more possible rows than it trains on. Held-out rows are combinations that no training row
has, made of parts that training rows have; so memory alone does not answer them, and the skill does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from examples.capo_tiny.questions import known_questions
from examples.capo_tiny.world import world

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Pair:
    """A message of the user and the one right answer."""

    message: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


def support() -> Task:
    """A shop's help desk: say in JSON what a customer's message is about and whether it is urgent."""
    phrases = _phrases()["support"]
    tones = [
        (text, urgent) for urgent, texts in ((True, phrases["urgent"]), (False, phrases["calm"])) for text in texts
    ]
    pairs = [
        Pair(f"{pattern.format(item=item)} {text}".strip(), json.dumps({"topic": topic, "urgent": urgent}))
        for topic, patterns in phrases["topics"].items()
        for pattern, item, (text, urgent) in product(patterns, world()["objects"], tones)
    ]
    return _split(pairs, num_train=520, num_held_out=40, seed="support")


def old_vale() -> Task:
    """Translate short sentences into the valley's old language, whose words and word order nobody else has."""
    words = _phrases()["old_vale"]
    pairs = [
        Pair(
            f"Old Vale: the {colour} {animal} {verb}",
            f"{words['animals'][animal]} {words['colours'][colour]} {words['verbs'][verb]}",
        )
        for colour, animal, verb in product(words["colours"], words["animals"], words["verbs"])
    ]
    return _split(pairs, num_train=440, num_held_out=40, seed="old vale")


def crier() -> Task:
    """Answer what the base knows in the voice of a town crier; held-out facts are not in the training rows."""
    pattern = _phrases()["crier"]["answer"]
    rng = random.Random("crier")
    by_answer: dict[str, list[Pair]] = {}
    for exchange in known_questions():
        if exchange.fact is not None:
            pair = Pair(exchange.question, pattern.format(answer=exchange.answer))
            by_answer.setdefault(pair.answer, []).append(pair)
    answers = rng.sample(sorted(by_answer), len(by_answer))
    held_out = tuple(rng.choice(by_answer[answer]) for answer in answers[:40])
    others = [pair for answer in answers[40:] for pair in by_answer[answer]]
    return Task(train=tuple(rng.sample(others, 520)), held_out=held_out)


TASKS: dict[str, Callable[[], Task]] = {"support": support, "old-vale": old_vale, "crier": crier}


def rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": pair.message},
                {"role": "assistant", "content": pair.answer},
            ]
        }
        for pair in pairs
    ]


def write_all(directory: Path) -> None:
    """Write every task's two files into a folder of its own below ``directory``."""
    for name, make in TASKS.items():
        task = make()
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, pairs in (("train", task.train), ("held_out", task.held_out)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(pairs)]
            (folder / f"{file_name}.jsonl").write_text("".join(lines), "utf-8")


def _split(pairs: Sequence[Pair], *, num_train: int, num_held_out: int, seed: str) -> Task:
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    held_out, train = shuffled[:num_held_out], shuffled[num_held_out:][:num_train]
    return Task(train=tuple(train), held_out=tuple(held_out))


@cache
def _phrases() -> dict[str, Any]:
    patterns: dict[str, Any] = json.loads((HERE / "phrases.json").read_text("utf-8"))
    return patterns


if __name__ == "__main__":
    write_all(HERE)
