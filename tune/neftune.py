"""NEFTune: uniform noise on the embeddings while training (https://arxiv.org/abs/2310.05914)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tune.model import Model


@contextmanager
def noisy_embeddings(model: Model, alpha: float | None) -> Iterator[None]:
    """Within, embeddings get noise in [-alpha, alpha] / sqrt(T * width) in training mode; ``None`` adds nothing.

    T is the length of the batch's rows with padding, as in TRL.
    """
    if alpha is None:
        yield
        return

    def add_noise(module: torch.nn.Module, given: Any, embedded: torch.Tensor) -> torch.Tensor:
        del given
        if not module.training:
            return embedded
        size = alpha / math.sqrt(embedded.shape[1] * embedded.shape[2])
        return embedded + torch.empty_like(embedded).uniform_(-size, size)

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
