"""How a step's sequences are cut into forward passes with little padding.

Every row of a pass is padded to its longest one, so a long sequence among short ones makes the machine work on nothing.
More passes pad less, but each pass costs something of its own. Loss and gradient of a step are sums over its tokens, so
the cut changes neither.
"""

from __future__ import annotations

from collections.abc import Sequence

_PASS_COST_TOKENS = {"cpu": 64, "cuda": 4096}
"""What a pass costs beside its tokens, in tokens: about right for capo-tiny on a CPU core (20 to 40 ms). The value for
a GPU, where launching kernels costs more than a few short rows, is an assumption that no GPU has confirmed.
"""


def cut(lengths: Sequence[int], most: int, device_type: str) -> list[list[int]]:
    """Groups of at most ``most`` of the numbers 0 .. len(lengths) - 1, longest first; the cheapest such cut.

    Cheapest = fewest padded tokens plus the passes' own cost. Groups of neighbours in length are enough, and the best
    cut of the first n of them follows from the best cuts of fewer (dynamic programming).
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    cost_of_pass = _PASS_COST_TOKENS.get(device_type, 0)
    best = [0]
    start_of_last = [0]
    for end in range(1, len(order) + 1):
        costs = {
            start: best[start] + (end - start) * lengths[order[start]] + cost_of_pass
            for start in range(max(0, end - most), end)
        }
        start = min(costs, key=lambda start: costs[start])
        best.append(costs[start])
        start_of_last.append(start)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[start_of_last[end] : end])
        end = start_of_last[end]
    return groups[::-1]
