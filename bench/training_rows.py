"""Chat rows of mixed length, as chats are: most are short, a few are long (log-normal)."""

from __future__ import annotations

import random
from typing import Any

_THINGS = ("boat", "lamp", "mill", "well", "gate", "barn", "cart", "bell", "kiln", "loom")
_STATES = ("red", "old", "dry", "tall", "lost", "new", "cold", "wide", "shut", "loud")


def mixed_length_rows(number: int) -> list[dict[str, Any]]:
    chance = random.Random(5)
    return [{"messages": _conversation(chance, round(chance.lognormvariate(1.6, 0.9)) + 1)} for _ in range(number)]


def _conversation(chance: random.Random, sentences: int) -> list[dict[str, str]]:
    facts = [f"The {chance.choice(_THINGS)} is {chance.choice(_STATES)}." for _ in range(min(sentences, 60))]
    thing = chance.choice(facts).split()[1]
    state = next(fact.split()[3] for fact in facts if fact.split()[1] == thing)
    return [
        {"role": "user", "content": " ".join(facts) + f" How is the {thing}?"},
        {"role": "assistant", "content": f"The {thing} is {state}"},
    ]
