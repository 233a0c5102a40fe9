"""Which adapters were refused, why, and for how long that holds."""

from __future__ import annotations

import copy
import logging
import math
import time

from registry import errors
from serve.metrics import Metrics

logger = logging.getLogger(__name__)

_ENGINE_VERDICT_SECONDS = 60.0


class Refusals:
    """Verdicts by revision."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._verdicts: dict[str, tuple[errors.InvalidArtifactError, float]] = {}
        """The reason, and until when it holds (``time.monotonic()``)."""

    def add(self, revision: str, error: errors.InvalidArtifactError) -> None:
        # An artifact never changes, so neither does a verdict on it; but the engine may change its mind, and damage may
        # be repaired (:meth:`forget_damage`).
        expires_at = time.monotonic() + _ENGINE_VERDICT_SECONDS if error.code == "engine_refused" else math.inf
        if (known := self.get(revision)) is not None and known.code == error.code:
            return  # two looked at it at once, a request and who loads ahead of requests
        self._verdicts[revision] = (copy.copy(error), expires_at)
        self._metrics.adapter_refused(error.code)
        logger.warning("refused %s: %s", revision, error.message)

    def get(self, revision: str) -> errors.InvalidArtifactError | None:
        error, expires_at = self._verdicts.get(revision, (None, math.inf))
        if error is not None and time.monotonic() > expires_at:
            del self._verdicts[revision]
            return None
        return error

    def check(self, revision: str) -> None:
        """Damage is left to the gate, which sees at a glance whether the files are still those that it read: published
        again, the same content is the same revision.

        Raises:
            InvalidArtifactError: it was refused.
        """
        if (error := self.get(revision)) is not None and error.code != "damaged":
            raise copy.copy(error)  # a raised instance collects tracebacks, and those keep requests alive

    def forget_damage(self, revision: str) -> None:
        """The gate found nothing, so what was damaged has been repaired."""
        if (error := self.get(revision)) is not None and error.code == "damaged":
            self.forget(revision)

    def forget(self, revision: str) -> None:
        """The artifact is gone; another one of this revision would be judged anew."""
        self._verdicts.pop(revision, None)
