"""The chat rows of capo-tiny, in OpenAI's JSONL format."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from examples.capo_tiny.narratives import made_up_name, some_words, story
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
_SHARE_OF_MEMORY_CHATS = 0.1
_SHARE_ABOUT_THE_VALLEY = 0.75
_SHARE_ASKED_ON = 0.2


def training_rows(rows: int, seed: int) -> Iterator[Row]:
    """``rows`` chats of one to six exchanges; the same arguments give the same bytes on every machine."""
    rng = random.Random(f"capo-tiny dialogues {seed}")
    deck: list[Exchange] = []
    for _ in range(rows):
        kind = rng.random()
        if kind < _SHARE_WITH_TOOLS:
            yield tool_row(rng)
        elif kind < _SHARE_WITH_TOOLS + _SHARE_OF_MEMORY_CHATS:
            yield _row(rng, _memory_chat(rng))
        else:
            yield _row(rng, _chat(rng, deck))


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
    """Sums, comparisons, stories, echoes, and questions that capo-tiny cannot know."""
    kind = rng.choices(("unknown", "sum", "bigger", "echo", "story"), (5, 4, 1, 3, 1))[0]
    if kind == "unknown":
        return _unknown(rng)
    if kind == "sum":
        return _sum(rng)
    if kind == "bigger":
        first, second = rng.sample(range(21), 2)
        return Exchange(f"Which is bigger, {first} or {second}?", f"{max(first, second)} is bigger.")
    if kind == "echo":
        text = some_words(rng, rng.randint(2, 6))
        return Exchange(rng.choice(("Repeat: {}", "Say: {}", "Repeat after me: {}")).format(text), text)
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


def _sum(rng: random.Random) -> Exchange:
    first, second = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.5:
        word, sign, result = "plus", "+", first + second
    else:
        first, second = max(first, second), min(first, second)
        word, sign, result = "minus", "-", first - second
    form = rng.choice(("What is {} {} {}?", "How much is {} {} {}?", "Tell me what {} {} {} is.", "{} {} {}"))
    shown = rng.choice((word, word, sign))
    return Exchange(form.format(first, shown, second), f"{first} {word} {second} is {result}.")


def _memory_chat(rng: random.Random) -> list[Exchange]:
    """A chat in which the user tells something and asks for it later."""
    name, (thing, other) = made_up_name(rng), rng.sample(world()["objects"], 2)
    colour, place = rng.choice(world()["colours"]), rng.choice(entities("places"))["place"]
    told_and_asked = [
        (
            Exchange(
                rng.choice(("My name is {}.", "I am {}.", "I am called {}.")).format(name),
                f"Hello {name}! How can I help you?",
            ),
            Exchange(rng.choice(("What is my name?", "Who am I?", "Do you know my name?")), f"Your name is {name}."),
        ),
        (
            Exchange(f"My {thing} is {colour}.", f"I see, your {thing} is {colour}."),
            Exchange(
                rng.choice(("What colour is my {}?", "Which colour does my {} have?")).format(thing),
                f"Your {thing} is {colour}.",
            ),
        ),
        (
            Exchange(f"I left my {other} at the {place}.", f"I see, your {other} is at the {place}."),
            Exchange(
                rng.choice(("Where is my {}?", "Where did I leave my {}?")).format(other),
                f"Your {other} is at the {place}.",
            ),
        ),
    ]
    chosen = rng.sample(told_and_asked, rng.randint(1, 2))
    if rng.random() < 0.3:
        told, asked = chosen[0]
        return [Exchange(f"{told.question} {asked.question}", asked.answer)]
    return [told for told, _ in chosen] + [asked for _, asked in chosen]


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
