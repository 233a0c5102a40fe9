"""How the learning rate moves over a stage: warm-up, then the scheduler's curve. Pure functions of the recipe."""

from __future__ import annotations

import math

from tune.recipe import Stage

_WARMUP_SHARE = 0.05
_NUM_CYCLES = 2
_DECAY_SHARE = 0.1


def num_warmup_steps(stage: Stage, total_steps: int) -> int:
    if stage.warmup_steps is not None:
        return min(stage.warmup_steps, total_steps)
    share = _WARMUP_SHARE if stage.warmup_share is None else stage.warmup_share
    return round(share * total_steps)


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
            cycles = _NUM_CYCLES if stage.num_cycles is None else stage.num_cycles
            if step == steps:
                return 0.0  # the end of the last cycle, not the start of one more
            return 0.5 * (1.0 + math.cos(math.pi * (progress * cycles % 1.0)))
        case "wsd":
            share = _DECAY_SHARE if stage.decay_share is None else stage.decay_share
            decay_steps = min(steps, max(1, round(share * total_steps)))
            return min(1.0, (steps - step) / decay_steps)
