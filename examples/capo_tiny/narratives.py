"""The continued-pre-training corpus: short portraits, lists and stories of Hollin Vale.

Every row is ``{"text": ...}``. A fact is told in several words and in several companies, because a small
model only learns to be asked about a fact that it has read in more than one way (Allen-Zhu and Li,
"Physics of Language Models: Part 3.1", arXiv:2309.14316).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from examples.capo_tiny.questions import known_questions
from examples.capo_tiny.world import Fact, entities, facts, phrases, world

Row = dict[str, str]


def corpus(rows: int, seed: int) -> Iterator[Row]:
    """``rows`` texts; the same arguments give the same bytes on every machine."""
    rng = random.Random(f"capo-tiny corpus {seed}")
    kinds: list[tuple[Callable[[random.Random], str], int]] = [
        (_portrait, 10),
        (_place_and_people, 3),
        (_mixture, 4),
        (_interview, 8),
        (_sums, 2),
        (_market_list, 2),
        (_echoes, 2),
        (lambda rng: story(rng, rng.choice(entities("people"))), 2),
    ]
    writers, weights = zip(*kinds, strict=True)
    for _ in range(rows):
        (writer,) = rng.choices(writers, weights)
        yield {"text": writer(rng)}


def story(rng: random.Random, person: dict[str, str]) -> str:
    """Six sentences about one person's walk."""
    animal, season = rng.choice(entities("animals")), rng.choice(entities("seasons"))
    place = rng.choice([place for place in entities("places") if place["place"] != person["home"]])
    slots = {**animal, **season, **person, "place": place["place"]}
    parts = phrases()["story"]
    return " ".join(
        rng.choice(parts[part]).format_map(slots) for part in ("openings", "meetings", "middles", "turns", "endings")
    )


def made_up_name(rng: random.Random) -> str:
    """A name that nobody in the valley has, such as ``Belmi``."""
    return "".join(rng.sample(world()["syllables"], rng.choice((2, 2, 3)))).capitalize()


def some_words(rng: random.Random, count: int) -> str:
    """Words of the valley and made-up names, without any sense."""
    words = [*world()["objects"], *world()["colours"], *(animal["animal"] for animal in entities("animals"))]
    words += [made_up_name(rng) for _ in range(20)]
    return " ".join(rng.choices(words, k=count))


def _portrait(rng: random.Random) -> str:
    """All that is known of one entity, in random order, by name first and then by pronoun."""
    table = rng.choices(("people", "places", "animals", "seasons", "jobs", "valley"), (10, 3, 4, 2, 2, 1))[0]
    if table in ("jobs", "valley"):
        chosen = rng.sample([fact for fact in facts() if fact.relation.of == table], 4)
        return _tell(rng, chosen)
    slots = rng.choice(entities(table))
    about = [fact for fact in facts() if fact.slots is slots]
    rng.shuffle(about)
    return _tell(rng, about)


def _place_and_people(rng: random.Random) -> str:
    place = rng.choice(entities("places"))
    here = [fact for fact in facts() if fact.slots is place]
    residents = [fact for fact in facts() if fact.relation.of == "people" and fact.slots["home"] == place["place"]]
    return _tell(rng, rng.sample(here, 3) + rng.sample(residents, 5))


def _mixture(rng: random.Random) -> str:
    return _tell(rng, rng.sample(facts(), 6))


def _interview(rng: random.Random) -> str:
    """Questions and answers as running text."""
    exchanges = rng.sample(known_questions(), 4)
    return "\n".join(f"{exchange.question} {exchange.answer}" for exchange in exchanges)


def _tell(rng: random.Random, chosen: list[Fact]) -> str:
    """One sentence per fact; a fact about the same entity as the one before may use the pronoun."""
    sentences = []
    before: Fact | None = None
    for fact in chosen:
        follows = before is not None and before.slots is fact.slots and bool(fact.relation.follow_ups)
        patterns = fact.relation.follow_ups if follows and rng.random() < 0.6 else fact.relation.statements
        sentences.append(rng.choice(patterns).format_map(fact.slots))
        before = fact
    return " ".join(sentences)


def _sums(rng: random.Random) -> str:
    """Six sums or differences of small numbers."""
    sentences = []
    for _ in range(6):
        first, second = rng.randint(0, 10), rng.randint(0, 10)
        if rng.random() < 0.5:
            sentences.append(f"{first} plus {second} is {first + second}.")
        else:
            sentences.append(f"{max(first, second)} minus {min(first, second)} is {abs(first - second)}.")
    return " ".join(sentences)


def _echoes(rng: random.Random) -> str:
    """Random words, three times over: the shortest way to learn to copy from the context."""
    words = some_words(rng, rng.randint(4, 9))
    return " ".join([words] * 3)


def _market_list(rng: random.Random) -> str:
    """Somebody with a made-up name buys things, and the text comes back to what they were."""
    name, objects = made_up_name(rng), rng.sample(world()["objects"], 3)
    colours = rng.sample(world()["colours"], 3)
    goods = [f"{colour} {thing}" for colour, thing in zip(colours, objects, strict=True)]
    return (
        f"{name} came to the market and bought a {goods[0]}, a {goods[1]} and a {goods[2]}. "
        f"The {objects[1]} of {name} is {colours[1]}. The {objects[0]} is {colours[0]}. "
        f"The {objects[2]} of {name} is {colours[2]}."
    )
