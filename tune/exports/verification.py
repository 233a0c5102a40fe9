"""Whether an export still is what it was made from: measured on rows, held against thresholds."""

from __future__ import annotations

from dataclasses import dataclass

from registry.errors import InvalidArtifactError
from tune.evaluation.scoring import Distance
from tune.exports.settings import Thresholds


@dataclass(frozen=True, slots=True)
class Verdict:
    distance: Distance
    thresholds: Thresholds
    failures: tuple[str, ...]
    """One sentence for each threshold that was passed over; empty when the export is good."""

    def require(self, what: str) -> None:
        """
        Raises:
            InvalidArtifactError: code ``export_not_faithful``.
        """
        if self.failures:
            raise InvalidArtifactError(
                f"{what} is not published: {'; '.join(self.failures)}. Choose a form that keeps more (more bits, "
                "smaller groups, a larger rank, more calibration rows), or thresholds that allow this.",
                code="export_not_faithful",
            )


def judge(distance: Distance, thresholds: Thresholds) -> Verdict:
    failures = []
    for name, value, limit in (
        ("KL divergence", distance.kl, thresholds.max_kl),
        ("relative change of perplexity", distance.perplexity_change, thresholds.max_perplexity_change),
        ("largest logit gap", distance.max_logit_gap, thresholds.max_logit_gap),
    ):
        if limit is not None and not value <= limit:  # NaN fails too
            failures.append(f"{name} is {value:.4g}, at most {limit:g} is allowed")
    least = thresholds.min_top1_agreement
    if least is not None and not distance.top1_agreement >= least:
        failures.append(f"top-1 agreement is {distance.top1_agreement:.4f}, at least {least:g} is required")
    return Verdict(distance, thresholds, tuple(failures))
