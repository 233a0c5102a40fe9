"""What a key may use: requests and tokens per minute, and requests at once, in this process.

Buckets that fill evenly: a key that was quiet for a minute may use a whole minute's worth at once. A request is let in
while there is a token left, and what it really cost is taken afterwards, so the last one may overdraw
and the next wait for it. Several replicas count apart from each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from capo.keys.records import KeyLimits, KeyRecord
from registry import errors


class Bound(StrEnum):
    """Which limit was met; a metric label and an error code's param."""

    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"
    CONCURRENCY = "concurrency"


@dataclass(slots=True)
class _Bucket:
    per_minute: int
    level: float
    filled_at: float

    def fill(self, now: float) -> None:
        self.level = min(self.per_minute, self.level + (now - self.filled_at) * self.per_minute / 60)
        self.filled_at = now

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.level) * 60 / self.per_minute)


class Quota:
    """One key's use of this process. ``clock`` is monotonic seconds."""

    def __init__(self, limits: KeyLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._requests = self._bucket(limits.requests_per_minute)
        self._tokens = self._bucket(limits.tokens_per_minute)
        self._running = 0

    def enter(self) -> Bound | None:
        """Begin a request, or say which limit forbids it. What was begun must :meth:`leave`."""
        for bucket in (self._requests, self._tokens):
            if bucket is not None:
                bucket.fill(self._clock())
        if self.limits.concurrency is not None and self._running >= self.limits.concurrency:
            return Bound.CONCURRENCY
        if self._requests is not None and self._requests.level < 1:
            return Bound.REQUESTS
        if self._tokens is not None and self._tokens.level < 1:
            return Bound.TOKENS
        if self._requests is not None:
            self._requests.level -= 1
        self._running += 1
        return None

    def leave(self, tokens: int) -> None:
        """End a request that cost ``tokens``."""
        self._running -= 1
        if self._tokens is not None:
            self._tokens.level -= tokens

    def refusal(self, bound: Bound) -> errors.RateLimitedError:
        limits, seconds = self.limits, 1.0
        if bound is Bound.REQUESTS and self._requests is not None:
            seconds = self._requests.seconds_until(1)
            text = f"This key may send {limits.requests_per_minute} requests a minute"
        elif bound is Bound.TOKENS and self._tokens is not None:
            seconds = self._tokens.seconds_until(1)
            text = f"This key may use {limits.tokens_per_minute} tokens a minute"
        else:
            text = f"This key may have {limits.concurrency} requests at once"
        return errors.RateLimitedError(
            f"{text}, and has. Try again in {math.ceil(seconds)} s.", retry_after_seconds=math.ceil(seconds)
        )

    def headers(self) -> dict[str, str]:
        """As OpenAI names them (platform guide "Rate limits"); a reset is the time until all is there again."""
        told = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                told[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                told[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
                told[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.per_minute):.3f}s"
        return told

    def _bucket(self, per_minute: int | None) -> _Bucket | None:
        return None if per_minute is None else _Bucket(per_minute, per_minute, self._clock())


class Quotas:
    """Of every key that was used; a key with new limits starts afresh."""

    def __init__(self) -> None:
        self._of: dict[str, Quota] = {}

    def of(self, key: KeyRecord) -> Quota:
        quota = self._of.get(key.id)
        if quota is None or quota.limits != key.limits:
            quota = self._of[key.id] = Quota(key.limits)
        return quota
