"""A run that is killed at any moment goes on by itself and ends with the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sizes import LONG, size
from tests.tune.samples import write_jsonl
from tests.tune.test_methods_dpo import preference_rows
from tests.tune.workshop import Workshop

KILLS = size(2, 50)


@pytest.mark.timeout(14_400)  # of the full form, which takes more than an hour on two busy cores
def test_a_run_that_is_killed_at_a_random_moment_ends_with_the_same_bytes(workshop: Workshop) -> None:
    """Text and then chats, both packed, then preferences; with dropout, noise, validations and the best weights."""
    write_jsonl(workshop.root / "preferences.jsonl", preference_rows(24))
    stage = {
        "epochs": None,
        "max_steps": 9,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "neftune_alpha": 5,
        "evaluate_every_steps": 3,
        "early_stopping": {"patience": 50},
    }
    packed = stage | {"packing": True, "max_length": 128}
    preferences = {"kind": "dpo", "data": [{"path": "preferences.jsonl"}], "validation": {"share": 0.2}}
    recipe = workshop.recipe(
        method={"kind": "lora", "dropout": 0.1},
        checkpoint_every_steps=2,
        stages=[workshop.cpt(**packed), workshop.sft(**packed), preferences | stage],
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.tune.killed_run", str(workshop.root), str(KILLS)],
        input=json.dumps(recipe),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) == KILLS
    assert [outcome for outcome in outcomes if not outcome["same"]] == []
    if LONG:
        assert sum(bool(outcome["found"]) for outcome in outcomes) > 10, "many kills came after a checkpoint"
