"""Best-fit packing: several examples share one sequence, so that little compute goes into padding.

Examples in a pack never see each other: positions restart at each of them, and the model blocks attention
between them (``tune.train.forward``). Knows numbers only.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing (Johnson, 1973; at most 11/9 of the optimum).

    Args:
        lengths: tokens of each example, each in 1..``capacity``.
        capacity: tokens of a pack.

    Returns:
        Packs of indices into ``lengths``, in the order the packs were opened. Ties keep the given order, so
        equal input gives equal packs.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        assert 1 <= length <= capacity, (length, capacity)
        place = bisect_left(room, (length, -1))  # the fullest pack that still has room
        if place == len(room):
            packs.append([index])
            free, pack = capacity, len(packs) - 1
        else:
            free, pack = room.pop(place)
            packs[pack].append(index)
        if free > length:
            insort(room, (free - length, pack))
    return packs
