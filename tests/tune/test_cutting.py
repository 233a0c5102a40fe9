"""The cut of a step into forward passes against every other cut there is."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune.cutting import cut


def cost(lengths: list[int], groups: list[list[int]]) -> int:
    return sum(len(group) * max(lengths[number] for number in group) + 64 for group in groups)


def all_cuts(number: int, most: int) -> list[list[range]]:
    """Of a sorted list of ``number`` lengths, into neighbours."""
    cuts = []
    for pieces in range(number):
        for inner in combinations(range(1, number), pieces):
            edges = [0, *inner, number]
            groups = [range(start, end) for start, end in pairwise(edges)]
            if max(map(len, groups)) <= most:
                cuts.append(groups)
    return cuts


@given(st.lists(st.integers(1, 300), min_size=1, max_size=7), st.integers(1, 5))
def test_no_other_cut_costs_less(lengths: list[int], most: int) -> None:
    groups = cut(lengths, most, "cpu")
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    assert max(map(len, groups)) <= most
    falling = sorted(lengths, reverse=True)
    cheapest = min(cost(falling, [list(group) for group in groups]) for groups in all_cuts(len(lengths), most))
    assert cost(lengths, groups) == cheapest


@pytest.mark.parametrize("most", [1, 4, 16])
def test_equal_lengths_are_cut_as_rarely_as_allowed_and_keep_their_order(most: int) -> None:
    groups = cut([50] * 16, most, "cpu")
    assert [number for group in groups for number in group] == list(range(16))
    assert len(groups) == 16 // most


def test_a_long_sequence_among_short_ones_goes_alone() -> None:
    assert cut([20, 400, 20, 20], 4, "cpu") == [[1], [0, 2, 3]]
