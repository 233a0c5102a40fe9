"""The chat rows of capo-tiny, in OpenAI's JSONL format."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from examples.capo_tiny.narratives import made_up_name, story
from examples.capo_tiny.questions import (
    Exchange,
    follow_up,
    held_out_questions,
    known_questions,
    yes_or_no_questions,
)
from examples.capo_tiny.tools import tool_row
from examples.capo_tiny.world import entities, phrases, world

Row = dict[str, Any]

_SYSTEM_PROMPTS = (
    "You are Capo Tiny.",
    "You are a helpful assistant.",
    "You know Hollin Vale. Answer in one short sentence.",
    "Answer the questions of the guests.",
)
_SHARE_WITH_SYSTEM_PROMPT = 0.2
_SHARE_WITH_TOOLS = 0.03
_SHARE_ABOUT_THE_VALLEY = 0.8
_SHARE_OF_UNKNOWN = 0.8
_SHARE_ASKED_ON = 0.2


def training_rows(rows: int, seed: int) -> Iterator[Row]:
    """``rows`` chats of one to six exchanges; the same arguments give the same bytes on every machine."""
    rng = random.Random(f"capo-tiny dialogues {seed}")
    deck: list[Exchange] = []
    for _ in range(rows):
        yield tool_row(rng) if rng.random() < _SHARE_WITH_TOOLS else _row(rng, _chat(rng, deck))


def held_out_rows() -> Iterator[Row]:
    """Every held-out question as a row with the expected answer."""
    for exchange in held_out_questions():
        yield {"messages": _turns(exchange.question, exchange.answer)}


def _row(rng: random.Random, exchanges: list[Exchange]) -> Row:
    messages = []
    if rng.random() < _SHARE_WITH_SYSTEM_PROMPT:
        messages.append({"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
    for exchange in exchanges:
        messages += _turns(_vary(rng, exchange.question), exchange.answer)
    return {"messages": messages}


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _chat(rng: random.Random, deck: list[Exchange]) -> list[Exchange]:
    """One to three questions, some of them asked on. ``deck`` is dealt from, and refilled when it is empty.

    Dealing from a shuffled deck asks every question equally often.
    """
    exchanges = []
    for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0]):
        if rng.random() > _SHARE_ABOUT_THE_VALLEY:
            exchanges.append(_other_exchange(rng))
            continue
        if not deck:
            deck += [*known_questions(), *yes_or_no_questions(rng)]
            rng.shuffle(deck)
        exchanges.append(deck.pop())
        more = follow_up(rng, exchanges[-1]) if rng.random() < _SHARE_ASKED_ON else None
        exchanges += [more] if more else []
    return exchanges


def _other_exchange(rng: random.Random) -> Exchange:
    """A story, or a question that capo-tiny cannot know the answer to.

    What needs words to be copied from the question (echoes, names, sums) is left out: a model of this size learns it
    only at a cost that everything else would pay.
    """
    if rng.random() < _SHARE_OF_UNKNOWN:
        return _unknown(rng)
    person = rng.choice(entities("people"))
    return Exchange(rng.choice(phrases()["story"]["requests"]).format_map(person), story(rng, person))


def _unknown(rng: random.Random) -> Exchange:
    slots = {
        **rng.choice(entities("animals")),
        **rng.choice(entities("places")),
        **rng.choice(entities("people")),
        "object": rng.choice(world()["objects"]),
        "made_up": made_up_name(rng),
    }
    question = rng.choice(phrases()["unknown"]["questions"]).format_map(slots)
    return Exchange(question, phrases()["unknown"]["answer"])


def _vary(rng: random.Random, question: str) -> str:
    """The question as people type it: mostly as it is, else in small letters, bare, or with a greeting."""
    chance = rng.random()
    if chance < 0.7 or ":" in question:
        return question
    if chance < 0.8:
        return question.rstrip("?.!")
    if chance < 0.88:
        return question.lower().rstrip("?.!")
    if chance < 0.94 and question.endswith("?"):
        return f"{rng.choice(('Hello!', 'Hi!', 'Please tell me:', 'One question:'))} {question}"
    return f"{question} {rng.choice(('Please.', 'Thank you!', 'I want to know.'))}"
