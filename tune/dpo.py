"""Direct preference optimisation (https://arxiv.org/abs/2305.18290, equation 7).

    loss = -log sigmoid(beta * ((log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected))))

where p is the model, ref the model as it was when the stage began, and each log-probability a sum over the answer's
tokens. The reference's numbers are measured once, before the first step: one pass over the pairs, after which no
second model is needed, whatever is trained. Where a LoRA adapter starts in this very stage they are those of the base,
that is of the model with its adapter switched off. They are kept in a file, because a run that goes on from a
checkpoint no longer has the weights they came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from registry.errors import StorageError
from tune.data.batches import Pack
from tune.data.pairs import PreferenceExample
from tune.forward import NOT_TRAINED, collate, token_losses
from tune.model import Trainable
from tune.objectives import Losses
from tune.recipe import Dpo


class Reference:
    """Log-probabilities that the model of the stage's beginning gives both answers of each pair."""

    def __init__(self) -> None:
        self._of_pair: dict[bytes, torch.Tensor] = {}
        """[2] float32 for each pair's key: the chosen and the rejected answer."""

    def measure(self, trainable: Trainable, pairs: Sequence[PreferenceExample], micro_batch_size: int) -> None:
        """Ask ``trainable`` as it is now, in evaluation mode; pairs that are known already are not asked again."""
        was_training = trainable.model.training
        trainable.model.eval()
        by_length = sorted(range(len(pairs)), key=lambda index: -_num_tokens(pairs[index]))
        with torch.no_grad():
            for start in range(0, len(by_length), micro_batch_size):
                asked = [pairs[index] for index in by_length[start : start + micro_batch_size]]
                asked = [pair for pair in asked if pair.key not in self._of_pair]
                if asked:
                    answers = _ask(trainable, asked)
                    for pair, logarithms in zip(asked, answers.log_probabilities.T.cpu(), strict=True):
                        self._of_pair[pair.key] = logarithms.clone()
        trainable.model.train(was_training)

    def of(self, pairs: Sequence[PreferenceExample]) -> torch.Tensor:
        """[2, P]"""
        return torch.stack([self._of_pair[pair.key] for pair in pairs], dim=1)

    def keep(self, path: Path) -> None:
        """Write what was measured, whole or not at all."""
        staging = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key.hex(): pair for key, pair in self._of_pair.items()}, staging)
            staging.replace(path)
        except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
            raise StorageError(f"cannot write {path}: {error}; free some space and resume") from error

    def load(self, path: Path) -> None:
        """Read what ``keep`` wrote.

        Raises:
            StorageError: it is not there or damaged.
        """
        try:
            kept = load_file(path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"the reference log-probabilities of this stage cannot be read from {path}: {error}; the weights they "
                "came from are gone, so remove the run's checkpoints and start it again"
            ) from error
        self._of_pair = {bytes.fromhex(key): pair for key, pair in kept.items()}


class PreferenceObjective:
    """The sigmoid loss, and on request the chosen answer's own cross-entropy beside it. The unit is a pair."""

    def __init__(self, pairs: Sequence[PreferenceExample], options: Dpo, reference: Reference) -> None:
        self._pairs = pairs
        self._options = options
        self._reference = reference

    def num_units(self, index: int) -> int:
        del index
        return 1

    def num_trained(self, index: int) -> int:
        pair = self._pairs[index]
        return pair.chosen.num_trained + pair.rejected.num_trained

    def length(self, index: int) -> int:
        return _num_tokens(self._pairs[index])

    def line(self, index: int) -> int:
        return self._pairs[index].chosen.line

    def losses(self, trainable: Trainable, sequences: Sequence[Pack]) -> Losses:
        pairs = [self._pairs[index] for (index,) in sequences]
        answers = _ask(trainable, pairs)
        reference = self._reference.of(pairs).to(answers.log_probabilities.device)
        rewards = self._options.beta * (answers.log_probabilities - reference)  # section 4: the implicit rewards
        margins = rewards[0] - rewards[1]
        total = -torch.nn.functional.logsigmoid(margins).sum()
        if self._options.sft_weight:
            total = total - self._options.sft_weight * (answers.log_probabilities[0] / answers.lengths[0]).sum()
        accuracies = (margins.detach() > 0).float().sum()
        return Losses(
            total,
            accuracies,
            answers.num_tokens,
            {
                "rewards/chosen": rewards[0].detach().sum(),
                "rewards/rejected": rewards[1].detach().sum(),
                "rewards/margins": margins.detach().sum(),
                "rewards/accuracies": accuracies,
            },
        )


@dataclass(frozen=True, slots=True)
class _Answers:
    """What a model says to P pairs; row 0 holds the chosen answers, row 1 the rejected ones."""

    log_probabilities: torch.Tensor
    """[2, P]: sums over each answer's tokens."""
    lengths: torch.Tensor
    """[2, P]: tokens of each answer."""
    num_tokens: int
    """That went through the model."""


def _ask(trainable: Trainable, pairs: Sequence[PreferenceExample]) -> _Answers:
    rows = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    batch = collate(rows, [(row,) for row in range(len(rows))])
    losses, _ = token_losses(trainable, batch)  # [N], row by row
    row_of_token = (batch.targets != NOT_TRAINED).nonzero()[:, 0].to(losses.device)  # [N]
    zeros = torch.zeros(len(rows), device=losses.device)
    sums = zeros.index_add(0, row_of_token, losses)
    lengths = zeros.index_add(0, row_of_token, torch.ones_like(losses))
    return _Answers(-sums.view(2, -1), lengths.view(2, -1), batch.num_tokens)


def _num_tokens(pair: PreferenceExample) -> int:
    return len(pair.chosen.token_ids) + len(pair.rejected.token_ids)
