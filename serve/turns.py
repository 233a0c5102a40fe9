"""Whose turn in the engine is over: which adapters leave for those that wait for a slot, and which need not after all.

Decides only; :mod:`serve.pool` does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serve.resident import Resident


@dataclass(frozen=True, slots=True)
class Turns:
    """``turn_seconds`` is how long a busy adapter keeps its slot while others wait, ``max_wait_seconds`` how long those
    do."""

    turn_seconds: float
    max_wait_seconds: float

    def over(
        self, loaded: Iterable[Resident], *, leaving: Sequence[Resident], line: Sequence[Resident], now: float
    ) -> tuple[list[Resident], float | None]:
        """Those of ``loaded`` whose turn ends now, all slots being busy and ``line`` not empty; and the seconds after
        which there may be more, ``None``: none without something else happening.

        As many leave as are in line, those with the longest turns first. Who waits for an adapter that drains needs no
        other slot: it is that adapter's own, or, once that has left, one more. None of those that leave may end soon,
        though, as one long answer is enough to hold a slot. So when the first in line has waited for half of its time,
        all go whose turn is up, and it gets the first slot that any of them frees.
        """
        draining = {resident.artifact.revision for resident in leaving if not resident.is_released}
        num_wanted = sum(resident.artifact.revision not in draining for resident in line) - len(leaving)
        in_turn = sorted(loaded, key=lambda resident: resident.turn_began_at)
        all_go_in = line[0].waiting_since + self.max_wait_seconds / 2 - now
        if all_go_in > 0:
            in_turn = in_turn[: max(num_wanted, 0)]
        remaining = [(resident.turn_began_at + self.turn_seconds - now, resident) for resident in in_turn]
        later = [seconds for seconds in (*(seconds for seconds, _ in remaining), all_go_in) if seconds > 0]
        return [resident for seconds, resident in remaining if seconds <= 0], min(later, default=None)
