"""How the learning rate moves over a stage: warm-up, then the scheduler's curve. Pure functions of the recipe."""

from __future__ import annotations

import math

from tune.choices import choose_decay_share, choose_num_cycles, choose_warmup_share
from tune.recipe import Stage


def num_warmup_steps(stage: Stage, total_steps: int) -> int:
    if stage.warmup_steps is not None:
        return min(stage.warmup_steps, total_steps)
    return round((choose_warmup_share(stage).value or 0.0) * total_steps)


def learning_rate_share(stage: Stage, step: int, total_steps: int) -> float:
    """Share of the peak rate for ``step`` (from 1): linear warm-up, then the scheduler's curve to its final share."""
    warmup_steps = num_warmup_steps(stage, total_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    final = stage.final_learning_rate_share
    return final + (1.0 - final) * _curve(stage, step - warmup_steps, total_steps - warmup_steps, total_steps)


def _curve(stage: Stage, step: int, steps: int, total_steps: int) -> float:
    """From 1 down to 0 over ``steps``, those after warm-up."""
    progress = step / steps
    match stage.scheduler:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "cosine_with_restarts":
            cycles = choose_num_cycles(stage).value
            assert cycles is not None, stage
            if step == steps:
                return 0.0  # the end of the last cycle, not the start of one more
            return 0.5 * (1.0 + math.cos(math.pi * (progress * cycles % 1.0)))
        case "wsd":
            share = choose_decay_share(stage).value
            assert share is not None, stage
            decay_steps = min(steps, max(1, round(share * total_steps)))
            return min(1.0, (steps - step) / decay_steps)
