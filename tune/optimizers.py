"""The optimizers a recipe can name. AdamW: https://arxiv.org/abs/1711.05101.

A parameter group may carry ``learning_rate_ratio``: its rate is the stage's times that.
"""

from __future__ import annotations

import torch

from tune.model import Trainable
from tune.recipe import Stage

_ADAM_BETA1 = 0.9


def make_optimizer(trainable: Trainable, stage: Stage, learning_rate: float) -> torch.optim.Optimizer:
    """The stage's optimizer over all trained parameters, without decay on vectors (norms, biases)."""
    grouped: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in trainable.parameters():
        decay = stage.weight_decay if parameter.dim() >= 2 else 0.0
        grouped.setdefault((decay, trainable.learning_rate_ratio(name)), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay, "learning_rate_ratio": ratio}
        for (decay, ratio), parameters in grouped.items()
    ]
    betas = (_ADAM_BETA1, stage.adam_beta2)
    if stage.optimizer == "adamw_8bit":
        import bitsandbytes  # a second, and most runs do without

        # Tensors of fewer than 4,096 numbers keep 32-bit states (its min_8bit_size).
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=learning_rate, betas=betas)
        return optimizer
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)  # fused on CPU and CUDA


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("learning_rate_ratio", 1.0)
