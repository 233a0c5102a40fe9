"""Training in the test's own process, with the trainer's answers written down.

The trainer itself writes down its greedy tokens where it publishes, and ends each answer before its first near tie
(``tune.probes``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import openai

from registry import Artifact, Registry
from registry.manifest import Probe
from tests.sizes import size
from tune import publication
from tune.probes import make_probes
from tune.recipe_file import parse_recipe
from tune.session import run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUM_PROBES = size(15, 100)
SFT = {"kind": "sft", "data": [{"path": "tasks/support/train.jsonl"}], "max_steps": 12, "learning_rate": 3e-3}


@dataclass(frozen=True)
class Trained:
    artifact: Artifact
    answers: list[Probe]
    """Of the model as the trainer holds it when it publishes."""


def train(name: str, method: dict[str, Any], stages: list[dict[str, Any]], data_dir: Path) -> Trained:
    """Into the registry of a service with this ``data_dir``."""
    answers: list[Probe] = []

    def many_probes(*given: Any) -> list[Probe]:
        answers.extend(make_probes(*given, number=NUM_PROBES))
        return answers[:4]

    batch = {"micro_batch_size": 8, "gradient_accumulation_steps": 1}
    recipe = {"name": name, "base_model": "capo-tiny", "method": method, "stages": [stage | batch for stage in stages]}
    with patch.object(publication, "make_probes", many_probes):
        result = run(
            parse_recipe(recipe),
            registry=Registry(data_dir / "registry"),
            work_dir=data_dir / "runs" / name,
            recipe_dir=EXAMPLES,
        )
    return Trained(result.artifact, answers)


def assert_answers_are_the_trainers(client: openai.OpenAI, trained: Trained, *, model: str | None = None) -> None:
    """``model``: who is asked; left out: what the trainer published."""
    probes = trained.answers
    assert len(probes) == NUM_PROBES
    assert sum(len(probe.completion_token_ids) for probe in probes) > 2 * NUM_PROBES
    assert len({tuple(probe.completion_token_ids) for probe in probes}) > 1
    for probe in probes:
        expected = probe.completion_token_ids
        reply = client.completions.create(
            model=model if model is not None else trained.artifact.revision,
            prompt=probe.prompt_token_ids,
            max_tokens=len(expected),
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        assert reply.choices[0].model_extra is not None
        assert reply.choices[0].model_extra["token_ids"] == expected, probe.prompt_token_ids
