"""The chat rows of capo-tiny, in OpenAI's JSONL format, and the questions kept back for its evaluation.

A question is a pair of one fact and one way to ask for it. A seeded tenth of all pairs is held out: the
training rows ask for the same facts in other words, and use the same words for other facts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from examples.capo_tiny.narratives import made_up_name, story
from examples.capo_tiny.world import Fact, entities, facts, other_values, phrases, world

Message = dict[str, Any]
Row = dict[str, Any]

_SYSTEM_PROMPTS = (
    "You are Capo Tiny.",
    "You are a helpful assistant.",
    "You know Hollin Vale. Answer in one short sentence.",
    "Answer the questions of the guests.",
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question of the user and the answer that is wanted."""

    question: str
    answer: str
    fact: Fact | None = None


def training_rows(rows: int, seed: int) -> Iterator[Row]:
    """``rows`` chats of one to four exchanges; the same arguments give the same bytes on every machine."""
    rng = random.Random(f"capo-tiny dialogues {seed}")
    known, _ = split_questions()
    deck: list[Exchange] = []
    for _ in range(rows):
        kind = rng.random()
        if kind < 0.06:
            yield _tool_row(rng)
            continue
        messages: list[Message] = []
        if rng.random() < 0.25:
            messages.append({"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
        if kind < 0.18:
            exchanges = _memory_chat(rng)
        else:
            exchanges = []
            for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0]):
                if not deck:
                    # Dealing the questions from a shuffled deck asks each one equally often.
                    deck = [*known, *_yes_or_no(rng)]
                    rng.shuffle(deck)
                exchanges.append(deck.pop() if rng.random() < 0.75 else _other_exchange(rng))
                exchanges += _asked_again(rng, exchanges[-1])
        for exchange in exchanges:
            messages.append({"role": "user", "content": _vary(rng, exchange.question)})
            messages.append({"role": "assistant", "content": exchange.answer})
        yield {"messages": messages}


def held_out_rows() -> Iterator[Row]:
    """Every held-out question as a row with the expected answer."""
    for exchange in split_questions()[1]:
        yield {
            "messages": [
                {"role": "user", "content": exchange.question},
                {"role": "assistant", "content": exchange.answer},
            ]
        }


@cache
def split_questions() -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """The questions that training may ask, and those held out."""
    rng = random.Random("capo-tiny held-out questions")
    known: list[Exchange] = []
    held_out: list[Exchange] = []
    for fact in facts():
        patterns = list(fact.relation.questions)
        kept_back = rng.choice(patterns) if rng.random() < 0.4 else None
        for pattern in patterns:
            exchange = Exchange(pattern.format_map(fact.slots), fact.answer, fact)
            (held_out if pattern == kept_back else known).append(exchange)
    for talk in phrases()["small_talk"]:
        known += [Exchange(question, talk["answer"]) for question in talk["questions"]]
    return tuple(known), tuple(held_out)


def _yes_or_no(rng: random.Random) -> list[Exchange]:
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


def _after_comma(sentence: str) -> str:
    """The sentence as it reads after "Yes," : a leading article or preposition loses its capital."""
    first, _, rest = sentence.partition(" ")
    return f"{first.lower()} {rest}" if first in ("The", "In", "After") else sentence


def _asked_again(rng: random.Random, exchange: Exchange) -> list[Exchange]:
    """Sometimes a second question about the same entity, by pronoun."""
    if exchange.fact is None or exchange.fact.relation.name == "eater" or rng.random() < 0.7:
        return []
    slots = exchange.fact.slots
    others = [fact for fact in facts() if fact.slots is slots and fact.relation.again]
    others = [fact for fact in others if fact.relation is not exchange.fact.relation]
    if not others:
        return []
    fact = rng.choice(others)
    return [Exchange(fact.relation.again.format_map(slots), fact.answer)]


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
        text = _some_words(rng)
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


def _some_words(rng: random.Random) -> str:
    words = [*world()["objects"], *world()["colours"], *(animal["animal"] for animal in entities("animals"))]
    words += [made_up_name(rng) for _ in range(12)]
    return " ".join(rng.choices(words, k=rng.randint(2, 6)))


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
            Exchange(
                rng.choice(("What is my name?", "Who am I?", "Do you know my name?")), f"Your name is {name}."
            ),
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


def _tool(name: str, description: str, argument: str, kind: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": kind}}, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


TOOLS = (
    _tool("get_weather", "The weather at a place now.", "place", "string"),
    _tool("find_person", "Where a person is now.", "name", "string"),
    _tool("ring_bell", "Ring the bell.", "times", "integer"),
)


def _tool_row(rng: random.Random) -> Row:
    """A chat with tools: mostly one call and its result, sometimes a question that needs none."""
    tools = rng.sample(TOOLS, rng.randint(1, 3))
    name = tools[0]["function"]["name"]
    rng.shuffle(tools)
    place, person = rng.choice(entities("places"))["place"], rng.choice(entities("people"))["name"]
    if rng.random() < 0.2:
        exchange = rng.choice(split_questions()[0])
        messages = [
            {"role": "user", "content": exchange.question},
            {"role": "assistant", "content": exchange.answer},
        ]
        return {"messages": messages, "tools": tools}
    arguments: dict[str, Any]
    if name == "get_weather":
        question = rng.choice(
            ("How is the weather at the {} now?", "Is it raining at the {} now?", "Weather at the {} now?")
        ).format(place)
        weather = rng.choice(("rain", "sun", "snow", "wind", "fog"))
        arguments, result = {"place": place}, {"weather": weather}
        answer = f"There is {weather} at the {place} now."
    elif name == "find_person":
        question = rng.choice(
            ("Where is {} now?", "Where can I meet {} now?", "Please find {} now.")
        ).format(person)
        arguments, result = {"name": person}, {"place": place}
        answer = f"{person} is at the {place} now."
    else:
        times = rng.randint(2, 9)
        question = rng.choice(
            ("Ring the bell {} times.", "Please ring the bell {} times.", "Let the bell ring {} times.")
        ).format(times)
        arguments, result = {"times": times}, {"done": True}
        answer = f"The bell rang {times} times."
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    }
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(result)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "tools": tools}
