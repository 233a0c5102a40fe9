"""Which adapters leave for those in line, worked out by hand."""

from __future__ import annotations

import asyncio

import pytest

from serve.engine_api import EngineAdapter
from serve.resident import AdapterState, Resident
from serve.turns import Turns
from tests.serve.test_pool import fake_artifact

TURNS = Turns(turn_seconds=1, max_wait_seconds=30)


def resident(name: str, *, turn_began_at: float = 0, waiting_since: float = 0, is_released: bool = False) -> Resident:
    artifact = fake_artifact(f"{name}@1")
    return Resident(
        artifact,
        EngineAdapter(artifact.revision, 1, artifact.path),
        state=AdapterState.LOADED,
        ready=asyncio.Future(),
        turn_began_at=turn_began_at,
        waiting_since=waiting_since,
        is_released=is_released,
    )


@pytest.mark.parametrize(
    ("line", "leaving", "now", "expected", "again_after"),
    [
        ("x", "", 100.0, "a", 15.0),
        ("xy", "", 100.0, "ab", 15.0),
        ("xyzw", "", 100.0, "abc", 15.0),
        ("x", "d", 100.0, "", 15.0),  # one leaves already
        ("xd", "d", 100.0, "", 15.0),  # and who waits for that one needs no other
        ("xyd", "d", 100.0, "a", 15.0),
        ("x", "d", 115.0, "abc", None),  # but it has not left for half of the wait
    ],
)
async def test_as_many_leave_as_wait_and_all_when_half_of_the_wait_is_over(
    line: str, leaving: str, now: float, expected: str, again_after: float | None
) -> None:
    loaded = [resident(name, turn_began_at=number) for number, name in enumerate("abc")]
    waiting = [resident(name, waiting_since=100.0) for name in line]
    over, seconds = TURNS.over(loaded[::-1], leaving=[resident(name) for name in leaving], line=waiting, now=now)
    assert "".join(r.artifact.name for r in over) == expected
    assert seconds == again_after


async def test_nobody_leaves_before_the_end_of_a_turn() -> None:
    loaded = [resident("a", turn_began_at=99.5), resident("b", turn_began_at=99.7)]
    over, seconds = TURNS.over(loaded, leaving=[], line=[resident("x", waiting_since=100.0)], now=100.0)
    assert over == []
    assert seconds == pytest.approx(0.5)


async def test_who_waits_for_an_adapter_that_leaves_for_good_needs_a_slot_as_well() -> None:
    leaving = [resident("d", is_released=True)]
    line = [resident("d", waiting_since=100.0), resident("x", waiting_since=100.0)]
    over, _ = TURNS.over([resident("a"), resident("b")], leaving=leaving, line=line, now=100.0)
    assert [r.artifact.name for r in over] == ["a"]
