"""Which adapters have metric series of their own: the busiest few; the rest share ``other``.

Without a bound, every adapter ever asked for would stay in the metrics page for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable

BASE_LABEL = "base"
OTHER_LABEL = "other"
MAX_LABELLED_ADAPTERS = 64
"""With as many busy ones a page of metrics is 1.2 MB, made in 0.1 s."""

_HALF_LIFE_SECONDS = 600.0
_TAKE_OVER_FACTOR = 1.5
_MAX_SCORED = 10_000


class AdapterLabels:
    """Label values by adapter name, for at most ``max_adapters`` names at a time.

    A name's score is its number of requests, halved every ten minutes. A name without a label of its own takes over the
    least busy one's when its score is half as high again, so that labels do not flap. ``on_drop`` is told whose series
    must go.
    """

    def __init__(
        self,
        max_adapters: int,
        on_drop: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_adapters = max_adapters
        self._on_drop = on_drop
        self._clock = clock
        self._scores: dict[str, float] = {}
        self._labelled: set[str] = set()
        self._decayed_at = clock()

    def of(self, name: str | None) -> str:
        """The label value for one more request of ``name``; ``None`` is the base model."""
        if name is None:
            return BASE_LABEL
        if name == OTHER_LABEL:
            return OTHER_LABEL  # an adapter's name, too; its series would go with it, and all that share this one
        self._decay()
        if name in self._scores or len(self._scores) < _MAX_SCORED:
            self._scores[name] = self._scores.get(name, 0.0) + 1.0
        if name in self._labelled:
            return name
        if len(self._labelled) < self._max_adapters:
            self._labelled.add(name)
            return name
        if not self._labelled:
            return OTHER_LABEL
        least = min(self._labelled, key=lambda other: self._scores.get(other, 0.0))
        if self._scores.get(name, 0.0) < _TAKE_OVER_FACTOR * self._scores.get(least, 0.0) + 1.0:
            return OTHER_LABEL
        self._labelled.discard(least)
        self._labelled.add(name)
        self._on_drop(least)
        return name

    def settled(self, label: str) -> str:
        """``label`` if it is still held, else what a request counts under that outlived it."""
        return label if label in self._labelled or label == BASE_LABEL else OTHER_LABEL

    def forget(self, name: str) -> None:
        """The adapter is gone, and so are its series."""
        self._scores.pop(name, None)
        if name in self._labelled:
            self._labelled.discard(name)
            self._on_drop(name)

    def _decay(self) -> None:
        now = self._clock()
        elapsed = now - self._decayed_at
        if elapsed < _HALF_LIFE_SECONDS / 10:
            return
        factor = 0.5 ** (elapsed / _HALF_LIFE_SECONDS)
        self._scores = {name: score * factor for name, score in self._scores.items() if score * factor > 0.01}
        self._decayed_at = now
