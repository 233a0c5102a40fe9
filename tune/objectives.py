"""What a stage minimises, behind one seam: how sequences of examples become a loss.

A loss is a sum over units, and the loss of an optimizer step is that sum divided by the step's units (``tune.step``).
The unit is a trained token, or a pair of answers (``tune.dpo``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tune.data.batches import Pack
from tune.data.mask import Example
from tune.forward import collate, token_losses
from tune.model import Trainable


@dataclass(frozen=True, slots=True)
class Losses:
    """What one forward pass says about its sequences; sums, so that micro batches add up."""

    total: torch.Tensor
    """Scalar, over the units; carries the gradient."""
    hits: torch.Tensor
    """Scalar: units that came out right: trained tokens that were the most likely one, pairs in the right order."""
    num_tokens: int
    """That went through the model, without padding."""
    figures: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars: more sums over the units, by the name under which their means are told."""


class Objective(Protocol):
    """Of one stage, over the examples it was made with; they are named by their index."""

    def num_units(self, index: int) -> int:
        """What an example adds to the number that the loss is divided by."""

    def num_trained(self, index: int) -> int:
        """Tokens of an example that carry loss."""

    def length(self, index: int) -> int:
        """Tokens of an example that go through the model."""

    def line(self, index: int) -> int:
        """Of the example's row in its file."""

    def losses(self, trainable: Trainable, sequences: Sequence[Pack]) -> Losses:
        """One forward pass."""


class LanguageModelling:
    """Cross-entropy of the trained tokens: sft, cpt, and both mixed. The unit is a trained token."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def num_units(self, index: int) -> int:
        return self._examples[index].num_trained

    def num_trained(self, index: int) -> int:
        return self._examples[index].num_trained

    def length(self, index: int) -> int:
        return len(self._examples[index].token_ids)

    def line(self, index: int) -> int:
        return self._examples[index].line

    def losses(self, trainable: Trainable, sequences: Sequence[Pack]) -> Losses:
        batch = collate(self._examples, sequences)
        losses, hits = token_losses(trainable, batch)
        return Losses(losses.sum(), hits.sum(), batch.num_tokens)
