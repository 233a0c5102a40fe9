"""How far two models are from each other, token by token, on the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tune.data.mask import Example
from tune.forward import collate, trained_logits
from tune.model import Trainable

_MAX_EXAMPLES = 64


@dataclass(frozen=True, slots=True)
class Difference:
    mean_kl: float
    """Kullback-Leibler divergence of the second model from the first in nats, mean over the trained tokens."""
    top1_agreement: float
    """Share of the trained tokens for which both find the same token most likely."""

    def sentence(self) -> str:
        return (
            f"the most likely token is the same in {self.top1_agreement:.1%} of cases, mean KL {self.mean_kl:.2g} nats"
        )

    def named(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}.mean_kl": self.mean_kl, f"{prefix}.top1_agreement": self.top1_agreement}


def compare(first: Trainable, second: Trainable, examples: Sequence[Example]) -> Difference:
    """Over the trained tokens of the first 64 of ``examples``; both models are left in evaluation mode."""
    first.model.eval()
    second.model.eval()
    divergence = agreeing = 0.0
    num_targets = 0
    with torch.no_grad():
        for example in examples[:_MAX_EXAMPLES]:
            batch = collate([example], [(0,)])
            expected, _ = trained_logits(first, batch)  # [N, V]
            given, _ = trained_logits(second, batch)
            expected, given = expected.log_softmax(-1), given.log_softmax(-1)
            divergence += float((expected.exp() * (expected - given)).sum())
            agreeing += float((expected.argmax(-1) == given.argmax(-1)).sum())
            num_targets += len(expected)
    return Difference(divergence / num_targets, agreeing / num_targets)
