"""Values Capo chooses where a recipe leaves them open, each with the reason that is printed and recorded.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from registry.errors import InvalidRequestError
from tune.methods import FreezeMethod, FullMethod, LowRankMethod, Method
from tune.recipe import Stage
from tune.sources import Validation

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Choice(Generic[Value]):
    """A value and why it was taken."""

    value: Value
    reason: str


@dataclass(frozen=True, slots=True)
class BatchShape:
    micro_batch_size: int
    gradient_accumulation_steps: int

    @property
    def sequences_per_step(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps


# Peak rates by (what is trained, stage kind). Adapters want about ten times the rate of full training, almost
# independent of the rank (LoRA Without Regret, thinkingmachines.ai, 2025; TRL's peft_integration guide gives the same
# values).
_LEARNING_RATES: dict[tuple[str, str], float] = {
    ("adapter", "sft"): 2e-4,
    ("adapter", "cpt"): 1e-4,
    ("adapter", "mixed"): 1e-4,  # most of a mixed stage is text
    ("adapter", "dpo"): 1e-5,
    ("weights", "sft"): 2e-5,
    ("weights", "cpt"): 1e-5,
    ("weights", "mixed"): 1e-5,
    ("weights", "dpo"): 1e-6,  # TRL's default
}
# Adam's best rate falls with the width of the model: as 1 / width by muP (https://arxiv.org/abs/2203.03466). The rates
# above were found on models 2,048 to 8,192 wide, where one value serves; below, the exponent 1.3 meets what capo-tiny
# (256 wide) was measured to need, 3e-3.
_USUAL_WIDTH = 2048
_WIDTH_EXPONENT = 1.3
_LONGEST_DEFAULT_TOKENS = 2048
_DEFAULT_EPOCHS = 3.0
_MOST_EPOCHS = 10.0
_FEWEST_ROW_VISITS = 2880
_FEWEST_STEPS = 250
_LARGEST_BATCH = 16
_SMALLEST_BATCH = 2
_LARGEST_MICRO_BATCH = 8
_WARMUP_SHARE = 0.05
"""3 to 5 % are usual: QLoRA's 3 (https://arxiv.org/abs/2305.14314), ms-swift's 5. The stages that are chosen here may
have but 250 steps, of which 3 % would be eight."""
_FEWEST_CYCLES = 2
_DECAY_SHARE = 0.1
"""MiniCPM's (https://arxiv.org/abs/2404.06395, section 4.3)."""


def choose_learning_rate(method: Method, stage: Stage, hidden_size: int | None = None) -> Choice[float]:
    """``hidden_size`` is the base's width, ``None`` where its config names none."""
    if stage.learning_rate is not None:
        return Choice(stage.learning_rate, "given in the recipe")
    trains = "weights" if isinstance(method, FullMethod | FreezeMethod) else "adapter"
    rate = _LEARNING_RATES[trains, stage.kind]
    reason = f"the usual peak for {method.kind} {stage.kind}"
    if hidden_size is not None and hidden_size < _USUAL_WIDTH:
        rate *= (_USUAL_WIDTH / hidden_size) ** _WIDTH_EXPONENT
        reason += f", raised for a base only {hidden_size} wide"
    if stage.learning_rate_multiplier != 1.0:
        rate *= stage.learning_rate_multiplier
        reason += f", times {stage.learning_rate_multiplier:g} as asked"
    return Choice(rate, reason)


def choose_packing(stage: Stage) -> Choice[bool]:
    if stage.packing is not None:
        return Choice(stage.packing, "given in the recipe")
    if stage.kind in ("cpt", "mixed"):
        return Choice(True, "text rows vary in length; packing wastes no compute on padding")
    if stage.kind == "dpo":
        return Choice(False, "a preference batch counts pairs")
    return Choice(False, "a chat batch counts rows")


def choose_max_length(stage: Stage, context_tokens: int | None) -> Choice[int]:
    """``context_tokens`` is the base's own limit, ``None`` where its config names none.

    Raises:
        InvalidRequestError: the stage asks for more: no engine serves positions behind that limit.
    """
    if stage.max_length is not None:
        if context_tokens is not None and stage.max_length > context_tokens:
            raise InvalidRequestError(
                f"max_length={stage.max_length} is more than the base's context of {context_tokens} tokens, and no "
                f"engine serves positions beyond it; set max_length to at most {context_tokens}, or leave it out",
                param="max_length",
            )
        return Choice(stage.max_length, "given in the recipe")
    if context_tokens is not None and context_tokens <= _LONGEST_DEFAULT_TOKENS:
        return Choice(context_tokens, "the base's context length")
    return Choice(_LONGEST_DEFAULT_TOKENS, "memory grows with length; longer rows need max_length")


def choose_epochs(stage: Stage, num_rows: int) -> Choice[float | None]:
    if stage.max_steps is not None:
        return Choice(None, f"max_steps={stage.max_steps} decides")
    if stage.epochs is not None:
        return Choice(stage.epochs, "given in the recipe")
    if stage.kind in ("cpt", "mixed"):
        return Choice(1.0, "one pass over text; repeats teach less than new text")
    wanted = math.ceil(_FEWEST_ROW_VISITS / max(1, num_rows))
    if wanted > _DEFAULT_EPOCHS:
        return Choice(min(float(wanted), _MOST_EPOCHS), f"few rows ({num_rows}) need more passes than the usual 3")
    return Choice(_DEFAULT_EPOCHS, "the default of TRL, LLaMA-Factory and Predibase for chat rows")


def choose_batch(stage: Stage, num_sequences: int, epochs: float | None) -> Choice[BatchShape]:
    """Pick what is open of the batch shape for ``num_sequences`` per epoch.

    Adapters learn worse from large batches when data is small, and need at least 100 steps (LoRA Without Regret;
    tinker-cookbook's hyperparam_utils); 250 were better on capo-tiny's tasks. So small data gets small batches.
    """
    micro, accumulation = stage.micro_batch_size, stage.gradient_accumulation_steps
    if micro is not None and accumulation is not None:
        return Choice(BatchShape(micro, accumulation), "given in the recipe")
    total = num_sequences * epochs if epochs is not None else math.inf
    batch = _LARGEST_BATCH
    while batch > _SMALLEST_BATCH and total / batch < _FEWEST_STEPS:
        batch //= 2
    if micro is None:
        micro = min(batch, _LARGEST_MICRO_BATCH) if accumulation is None else max(1, batch // accumulation)
    if accumulation is None:
        accumulation = max(1, batch // micro)
    reason = f"{num_sequences} sequences an epoch; the largest batch up to 16 that still leaves 250 steps"
    return Choice(BatchShape(micro, accumulation), reason)


def choose_validation(stage: Stage) -> Choice[Validation | None]:
    """How the validation file is read: as the data are, where the recipe does not say otherwise."""
    given = stage.validation
    if given is None or given.path is None:
        return Choice(given, "given in the recipe")
    shared = {source.system_prompt for source in stage.data}
    ignored = tuple(dict.fromkeys(key for source in stage.data for key in source.ignored_keys))
    chosen = {
        "system_prompt": (shared.pop() or "") if given.system_prompt is None else given.system_prompt,
        "ignored_keys": ignored if given.ignored_keys is None else given.ignored_keys,
    }
    return Choice(given.model_copy(update=chosen), "read as the data are, where the recipe does not say otherwise")


def choose_alpha(method: Method) -> Choice[int | None]:
    if not isinstance(method, LowRankMethod):
        return Choice(None, f"method {method.kind} has none")
    if method.alpha is not None:
        return Choice(method.alpha, "given in the recipe")
    return Choice(method.scaled_alpha, f"twice the rank {method.rank}, as TRL and Axolotl have it")


def choose_warmup_share(stage: Stage) -> Choice[float | None]:
    if stage.warmup_steps is not None:
        return Choice(None, f"warmup_steps={stage.warmup_steps} decides")
    if stage.warmup_share is not None:
        return Choice(stage.warmup_share, "given in the recipe")
    return Choice(_WARMUP_SHARE, "3 to 5 % of the steps are usual, and short stages want the longer warm-up")


def choose_num_cycles(stage: Stage) -> Choice[int | None]:
    if stage.scheduler != "cosine_with_restarts":
        return Choice(None, f"scheduler {stage.scheduler} has none")
    if stage.num_cycles is not None:
        return Choice(stage.num_cycles, "given in the recipe")
    return Choice(_FEWEST_CYCLES, "the fewest that restart")


def choose_decay_share(stage: Stage) -> Choice[float | None]:
    if stage.scheduler != "wsd":
        return Choice(None, f"scheduler {stage.scheduler} has none")
    if stage.decay_share is not None:
        return Choice(stage.decay_share, "given in the recipe")
    return Choice(_DECAY_SHARE, "the last tenth of the steps, as in MiniCPM")


def choose_final_weights(stage: Stage) -> Choice[Literal["last", "best"]]:
    if stage.final_weights is not None:
        return Choice(stage.final_weights, "given in the recipe")
    if stage.early_stopping is not None:
        return Choice("best", "early stopping ends a stage after its best step")
    return Choice("last", "the schedule brings the rate down for the last steps")
