"""The facts of Hollin Vale, the invented valley that capo-tiny knows.

``world.json`` lists who and what there is; ``phrases.json`` says how each kind of fact (a relation) is told,
asked and answered. A :class:`Fact` is one relation about one entity, with every slot that its phrases use.
All texts are our own and nothing here is random.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_OBJECT_FORM = {"he": "him", "she": "her"}


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact; every text is a ``str.format`` pattern over the slots of the entity."""

    name: str
    of: str
    """Which table of ``world.json`` the entities come from."""
    slot: str
    """The slot that a wrong yes/no question changes."""
    statements: tuple[str, ...]
    follow_ups: tuple[str, ...]
    """Statements that call the entity he, she or it, for use right after it was named."""
    questions: tuple[str, ...]
    answer: str
    again: str
    """The question with a pronoun, for a second turn about the same entity; may be empty."""
    confirm: tuple[str, ...]
    """Yes/no questions about ``slot``; may be empty."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One relation about one entity."""

    relation: Relation
    slots: Mapping[str, str]

    @property
    def answer(self) -> str:
        return self.relation.answer.format_map(self.slots)


@cache
def world() -> dict[str, Any]:
    """The tables of ``world.json``. Callers must not change them."""
    tables: dict[str, Any] = json.loads((_HERE / "world.json").read_text("utf-8"))
    return tables


@cache
def phrases() -> dict[str, Any]:
    """The patterns of ``phrases.json``. Callers must not change them."""
    patterns: dict[str, Any] = json.loads((_HERE / "phrases.json").read_text("utf-8"))
    return patterns


@cache
def entities(table: str) -> tuple[dict[str, str], ...]:
    """The rows of one table with the derived slots added, such as the capitalised pronoun."""
    return tuple(_with_derived_slots(table, row) for row in world()[table])


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact of the valley, in the order of the data files."""
    return tuple(Fact(relation, slots) for relation in _relations() for slots in entities(relation.of))


def other_values(fact: Fact) -> tuple[str, ...]:
    """What the fact's slot could hold but does not; sorted, so that a seeded choice is repeatable."""
    slot = fact.relation.slot
    return tuple(sorted({row[slot] for row in entities(fact.relation.of)} - {fact.slots[slot]}))


def person_slots(name: str) -> dict[str, str]:
    """The slots of one person.

    Raises:
        KeyError: nobody in the valley has this name.
    """
    for slots in entities("people"):
        if slots["name"] == name:
            return slots
    raise KeyError(name)


@cache
def _relations() -> tuple[Relation, ...]:
    return tuple(_relation(row) for row in phrases()["relations"])


def _relation(row: Mapping[str, Any]) -> Relation:
    """JSON knows lists only; a frozen record holds tuples."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Relation(**fields)


def _with_derived_slots(table: str, row: Mapping[str, str]) -> dict[str, str]:
    slots = dict(row)
    if table == "people":
        slots |= {
            "He": row["he"].capitalize(),
            "His": row["his"].capitalize(),
            "him": _OBJECT_FORM[row["he"]],
        }
    elif table == "places":
        names = [person["name"] for person in world()["people"] if person["home"] == row["place"]]
        slots["residents"] = " and ".join(names)
    elif table == "seasons":
        slots["Next"] = row["next"].capitalize()
    return slots
