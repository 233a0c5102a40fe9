"""From examples to loss: padding, packing without cross-attention, and cross-entropy on trained tokens only.

Axes: B sequences of a micro batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tune.data.batches import Pack
from tune.data.mask import Example
from tune.model import Trainable

NOT_TRAINED = -100
"""Target of a position that carries no loss; torch's and transformers' ignore_index."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass, on the CPU."""

    token_ids: torch.Tensor
    """[B, T] int64; padded at the end with 0."""
    targets: torch.Tensor
    """[B, T] int64; the next token where it is trained, else ``NOT_TRAINED``."""
    position_ids: torch.Tensor | None
    """[B, T] int64, restarting at each packed example; ``None`` without packing."""
    num_tokens: int
    """Without padding."""


def collate(examples: Sequence[Example], sequences: Sequence[Pack]) -> Batch:
    """Lay the sequences out as rows."""
    longest = max(sum(len(examples[i].token_ids) for i in sequence) for sequence in sequences)
    token_ids = np.zeros((len(sequences), longest), dtype=np.int64)
    targets = np.full((len(sequences), longest), NOT_TRAINED, dtype=np.int64)
    positions = np.zeros((len(sequences), longest), dtype=np.int64)
    num_tokens = 0
    for row, sequence in enumerate(sequences):
        start = 0
        for index in sequence:
            ids, trained = examples[index].token_ids, examples[index].trained
            end = start + len(ids)
            token_ids[row, start:end] = ids
            targets[row, start : end - 1] = np.where(trained[1:], ids[1:], NOT_TRAINED)
            positions[row, start:end] = np.arange(len(ids))
            start = end
        positions[row, start:] = np.arange(longest - start)  # padding counts as one more example
        num_tokens += start
    is_packed = any(len(sequence) > 1 for sequence in sequences)
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(positions) if is_packed else None,
        num_tokens=num_tokens,
    )


def token_losses(trainable: Trainable, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats and hit (0 or 1) of every trained token: two [N] float32 tensors, N = trained tokens.

    They come row by row, as the targets stand in the batch.
    """
    chosen, labels = trained_logits(trainable, batch)
    losses = torch.nn.functional.cross_entropy(chosen, labels, reduction="none")
    return losses, (chosen.detach().argmax(dim=-1) == labels).float()


def trained_logits(trainable: Trainable, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model says at every trained token, [N, V] float32, and the token itself, [N].

    No attention mask is passed: padding stands at the end, where causal attention never looks back from, and
    with restarting positions transformers blocks attention between packed examples itself
    (``masking_utils.find_packed_sequence_indices``), sliding windows included.
    """
    device = trainable.device
    targets = batch.targets.to(device)
    wanted = (batch.targets != NOT_TRAINED).any(dim=0).nonzero().squeeze(1)  # columns in which any row has a target
    with trainable.autocast():
        logits = trainable.model(
            input_ids=batch.token_ids.to(device),
            position_ids=batch.position_ids.to(device) if batch.position_ids is not None else None,
            use_cache=False,
            logits_to_keep=wanted.to(device),
        ).logits  # [B, wanted, V]
    targets = targets[:, wanted.to(device)]
    trained = targets != NOT_TRAINED
    return logits[trained].float(), targets[trained]
