"""What a model thinks of given tokens: loss and hits, and how far two models are apart.

Axes: B sequences, T tokens, N judged tokens, V vocabulary. Models compute in the precision they were loaded in;
figures are taken in float32. Written apart from ``tune.forward`` on purpose: what judges the training's result shares
no code with it but the examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tune.data.mask import Example


@dataclass(frozen=True, slots=True)
class Score:
    loss: float
    """Mean cross-entropy in nats over all judged tokens."""
    token_accuracy: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond that a float overflows


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a candidate's next-token distributions are from a reference's, over the judged tokens."""

    kl: float
    """Mean Kullback-Leibler divergence of the candidate from the reference, in nats."""
    top1_agreement: float
    """Share of tokens at which both have the same most likely next token."""
    max_logit_gap: float
    """The largest difference of any logit."""
    reference: Score
    candidate: Score

    @property
    def perplexity_change(self) -> float:
        """Relative to the reference; negative is better than it."""
        return self.candidate.perplexity / self.reference.perplexity - 1.0

    def figures(self) -> dict[str, float]:
        return {
            "kl": self.kl,
            "top1_agreement": self.top1_agreement,
            "max_logit_gap": self.max_logit_gap,
            "perplexity_change": self.perplexity_change,
            "reference_perplexity": self.reference.perplexity,
            "candidate_perplexity": self.candidate.perplexity,
            "judged_tokens": float(self.reference.num_tokens),
        }


def score(model: Any, examples: Sequence[Example], *, batch_size: int) -> Score:
    """Loss and accuracy of ``model`` on what the examples train."""
    sums = _Sums()
    for batch in _batches(examples, batch_size):
        logits, labels = _judged(model, batch)
        sums.add(logits, labels)
    return sums.score()


def distance(reference: Any, candidate: Any, examples: Sequence[Example], *, batch_size: int) -> Distance:
    """Compare two models that share a vocabulary; both are in memory at once."""
    of_reference, of_candidate = _Sums(), _Sums()
    divergence = agreeing = gap = 0.0
    for batch in _batches(examples, batch_size):
        (theirs, labels), (ours, _) = _judged(reference, batch), _judged(candidate, batch)
        of_reference.add(theirs, labels)
        of_candidate.add(ours, labels)
        log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
        agreeing += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
        gap = max(gap, float((theirs - ours).abs().max()))
    num_tokens = of_reference.num_tokens
    return Distance(
        kl=max(0.0, divergence / num_tokens),  # rounding can leave it a little below its least value
        top1_agreement=agreeing / num_tokens,
        max_logit_gap=gap,
        reference=of_reference.score(),
        candidate=of_candidate.score(),
    )


@dataclass(slots=True)
class _Sums:
    loss: float = 0.0
    hits: float = 0.0
    num_tokens: int = 0

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        self.loss += float(losses.double().sum())
        self.hits += float((logits.argmax(-1) == labels).sum())
        self.num_tokens += len(labels)

    def score(self) -> Score:
        assert self.num_tokens, "no token was judged"
        return Score(self.loss / self.num_tokens, self.hits / self.num_tokens, self.num_tokens)


def _batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    by_length = sorted(examples, key=lambda example: -len(example.token_ids))
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


@torch.no_grad()
def _judged(model: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] float32 that predict the trained tokens, and those tokens [N]. Padding stands at the end, where
    causal attention never looks back from, so no mask is needed."""
    longest = max(len(example.token_ids) for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    judged = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, example in enumerate(batch):
        length = len(example.token_ids)
        ids[row, :length] = torch.from_numpy(example.token_ids.astype("int64"))
        judged[row, :length] = torch.from_numpy(example.trained.astype("bool"))
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits  # [B, T, V]
    judged = judged[:, 1:].to(model.device)
    return logits[:, :-1][judged].float(), ids[:, 1:].to(model.device)[judged]
