"""Learning-rate curves against transformers' own schedulers, which were written by others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from registry.errors import InvalidRequestError
from tune.choices import choose_decay_share, choose_num_cycles, choose_warmup_share
from tune.recipe import Stage
from tune.recipe_file import parse_recipe
from tune.schedules import learning_rate_share, num_warmup_steps

TOTAL, WARMUP = 100, 10


def stage_of(**changes: Any) -> Stage:
    base = {"kind": "sft", "data": [{"path": "x"}], "final_learning_rate_share": 0.0, "warmup_steps": WARMUP}
    return Stage.model_validate(base | changes)


def shares_of(make: Callable[[torch.optim.Optimizer], Any]) -> list[float]:
    """The rates of a stock scheduler before each step and after the last: its step 0 is our warm-up's zero."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    shares = []
    for _ in range(TOTAL + 1):
        shares.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return shares


@pytest.mark.parametrize(
    ("given", "stock"),
    [
        ({"scheduler": "cosine"}, lambda o: get_cosine_schedule_with_warmup(o, WARMUP, TOTAL)),
        ({"scheduler": "linear"}, lambda o: get_linear_schedule_with_warmup(o, WARMUP, TOTAL)),
        (
            {"scheduler": "cosine_with_restarts", "num_cycles": 3},
            lambda o: get_cosine_with_hard_restarts_schedule_with_warmup(o, WARMUP, TOTAL, num_cycles=3),
        ),
        (
            {"scheduler": "wsd", "decay_share": 0.2},
            lambda o: get_wsd_schedule(o, WARMUP, 20, num_stable_steps=70, decay_type="linear"),
        ),
    ],
    ids=["cosine", "linear", "restarts", "wsd"],
)
def test_a_schedule_equals_that_of_transformers(given: dict[str, Any], stock: Callable[..., Any]) -> None:
    stage = stage_of(**given)
    ours = [learning_rate_share(stage, step, TOTAL) for step in range(1, TOTAL + 1)]
    assert ours == pytest.approx(shares_of(stock)[1:], abs=1e-6)


def test_a_constant_rate_stays_at_its_peak_after_the_warm_up() -> None:
    stage = stage_of(scheduler="constant")
    assert [learning_rate_share(stage, step, TOTAL) for step in (5, 10, 11, 100)] == [0.5, 1.0, 1.0, 1.0]


def test_what_a_scheduler_does_not_have_is_not_chosen_for_it() -> None:
    """A recipe with every choice filled in must be one that may be given."""
    assert choose_num_cycles(stage_of(scheduler="cosine_with_restarts")).value == 2
    assert choose_decay_share(stage_of(scheduler="wsd")).value == 0.1
    for scheduler in ("cosine", "linear", "constant"):
        stage = stage_of(scheduler=scheduler)
        assert (choose_num_cycles(stage).value, choose_decay_share(stage).value) == (None, None)
    assert choose_warmup_share(stage_of()).value is None, "warmup_steps decides"


def test_every_schedule_but_the_constant_one_ends_at_the_final_share() -> None:
    for scheduler in ("cosine", "linear", "cosine_with_restarts", "wsd"):
        stage = stage_of(scheduler=scheduler, final_learning_rate_share=0.25)
        assert learning_rate_share(stage, TOTAL, TOTAL) == pytest.approx(0.25), scheduler


@pytest.mark.parametrize(
    ("given", "steps"),
    [({}, 5), ({"warmup_share": 0.2}, 20), ({"warmup_steps": 7}, 7), ({"warmup_steps": 500}, 100)],
)
def test_warm_up_is_given_as_steps_or_as_a_share_and_never_exceeds_the_stage(given: dict[str, Any], steps: int) -> None:
    stage = Stage.model_validate({"kind": "sft", "data": [{"path": "x"}]} | given)
    assert num_warmup_steps(stage, TOTAL) == steps
    assert learning_rate_share(stage, max(1, steps), TOTAL) == 1.0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"warmup_share": 0.1, "warmup_steps": 3}, "warmup_share=0.1 and warmup_steps=3"),
        ({"num_cycles": 3}, "num_cycles=3 belongs to scheduler 'cosine_with_restarts', got 'cosine'"),
        ({"decay_share": 0.3, "scheduler": "linear"}, "decay_share=0.3 belongs to scheduler 'wsd', got 'linear'"),
        ({"scheduler": "poly"}, "'cosine', 'cosine_with_restarts'"),
        ({"early_stopping": {"patience": 2}}, "patience=2 counts validations, but evaluate_every_steps is not set"),
        ({"final_weights": "best"}, "final_weights='best' compares validations"),
        ({"optimizer": "sgd"}, "'adamw' or 'adamw_8bit', got 'sgd'"),
        ({"neftune_alpha": 0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], reason: str) -> None:
    stage = {"kind": "sft", "data": [{"path": "x"}]} | given
    with pytest.raises(InvalidRequestError, match=reason):
        parse_recipe({"name": "x", "base_model": "capo-tiny", "stages": [stage]})
