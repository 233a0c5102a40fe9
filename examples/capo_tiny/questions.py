"""The questions about Hollin Vale with their answers, and which of them are held out.

A question is a pair of one fact and one way to ask for it. A seeded part of all pairs is held out for the
evaluation: training asks for the same facts in other words, and uses the same words for other facts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from examples.capo_tiny.world import Fact, facts, other_values, phrases

_SHARE_OF_FACTS_WITH_A_HELD_OUT_QUESTION = 0.4


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question of the user and the answer that is wanted."""

    question: str
    answer: str
    fact: Fact | None = None


@cache
def known_questions() -> tuple[Exchange, ...]:
    """The questions that training may ask."""
    return _split_questions()[0]


@cache
def held_out_questions() -> tuple[Exchange, ...]:
    """The questions that no training row asks in these words."""
    return _split_questions()[1]


def yes_or_no_questions(rng: random.Random) -> list[Exchange]:
    """One true or one wrong yes/no question for every fact that has such questions."""
    exchanges = []
    for fact in facts():
        if not fact.relation.confirm:
            continue
        pattern, is_true = rng.choice(fact.relation.confirm), rng.random() < 0.5
        slots = dict(fact.slots)
        if not is_true:
            slots[fact.relation.slot] = rng.choice(other_values(fact))
        answer = f"{'Yes' if is_true else 'No'}, {_after_comma(fact.answer)}"
        exchanges.append(Exchange(pattern.format_map(slots), answer))
    return exchanges


def follow_up(rng: random.Random, exchange: Exchange) -> Exchange | None:
    """A question about the same entity by pronoun; ``None`` where the answer named no single one."""
    if exchange.fact is None:
        return None
    fact = exchange.fact
    others = [
        other
        for other in facts()
        if other.slots is fact.slots and other.relation.again and other.relation is not fact.relation
    ]
    if not others:
        return None
    other = rng.choice(others)
    return Exchange(other.relation.again.format_map(other.slots), other.answer)


def _split_questions() -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    rng = random.Random("capo-tiny held-out questions")
    known: list[Exchange] = []
    held_out: list[Exchange] = []
    for fact in facts():
        patterns = fact.relation.questions
        kept_back = rng.choice(patterns) if rng.random() < _SHARE_OF_FACTS_WITH_A_HELD_OUT_QUESTION else None
        for pattern in patterns:
            exchange = Exchange(pattern.format_map(fact.slots), fact.answer, fact)
            (held_out if pattern == kept_back else known).append(exchange)
    for talk in phrases()["small_talk"]:
        known += [Exchange(question, talk["answer"]) for question in talk["questions"]]
    return tuple(known), tuple(held_out)


def _after_comma(sentence: str) -> str:
    """The sentence as it reads after "Yes,": a leading article or preposition loses its capital."""
    first, _, rest = sentence.partition(" ")
    return f"{first.lower()} {rest}" if first in ("The", "In", "After") else sentence
