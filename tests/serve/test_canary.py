"""The split of an alias's requests: its size, who stays where, and what a larger share changes."""

from __future__ import annotations

import itertools
import math

import pytest

from registry import Alias, Canary
from serve.canary import Arm, choose

MAIN, CANARY = "support@" + "a" * 16, "support@" + "b" * 16
USERS = [f"user-{number}" for number in range(20_000)]


def alias(percent: int | None, *, name: str = "support", canary: str = CANARY) -> Alias:
    digest = canary.partition("@")[2] * 4
    running = None if percent is None else Canary(revision=canary, digest=digest, percent=percent)
    return Alias(alias=name, revision=MAIN, digest="a" * 64, history=[], write_once=False, updated_at=1, canary=running)


def on_canary(record: Alias) -> set[str]:
    return {user for user in USERS if choose(record, user)[1] is Arm.CANARY}


def within_six_sigma(count: int, total: int, percent: int) -> bool:
    """Six standard deviations of a binomial distribution: one false alarm in five hundred million runs."""
    share = percent / 100
    return abs(count - total * share) < 6 * math.sqrt(total * share * (1 - share))


def test_without_a_canary_everybody_gets_the_main_revision() -> None:
    assert {choose(alias(None), user) for user in [*USERS[:100], None]} == {(MAIN, None)}


@pytest.mark.parametrize("percent", [1, 10, 50, 99])
def test_requests_without_a_user_are_split_by_weight(percent: int) -> None:
    record = alias(percent)
    arms = [choose(record, None) for _ in range(20_000)]
    assert set(arms) == {(MAIN, Arm.MAIN), (CANARY, Arm.CANARY)}
    assert within_six_sigma(arms.count((CANARY, Arm.CANARY)), len(arms), percent)


@pytest.mark.parametrize("percent", [1, 10, 50, 99])
def test_users_are_split_by_weight_and_each_stays_where_he_is(percent: int) -> None:
    record = alias(percent)
    assert within_six_sigma(len(on_canary(record)), len(USERS), percent)
    assert on_canary(record) == on_canary(alias(percent))


def test_a_larger_share_keeps_those_who_have_the_canary() -> None:
    shares = [on_canary(alias(percent)) for percent in range(1, 100, 7)]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(shares))


@pytest.mark.parametrize("other", [alias(10, name="beta"), alias(10, canary="support@" + "c" * 16)])
def test_another_alias_or_another_canary_draws_anew(other: Alias) -> None:
    """Independent draws of a tenth each share a hundredth of the users; dependent ones would share all or none."""
    both = on_canary(alias(10)) & on_canary(other)
    assert within_six_sigma(len(both), len(USERS), 1)


def test_any_text_may_be_a_user() -> None:
    for user in ("", "\0", "ü", "\ud800", "x" * 100_000):
        assert choose(alias(50), user) == choose(alias(50), user)
