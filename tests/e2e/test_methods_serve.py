"""What every training method publishes serves, and answers what the trainer answered.

The trainer itself writes down its greedy tokens where it publishes, and ends each answer before its first near tie
(``tune.probes``). 25 prompts for each of a few methods; 100 for all of them with CAPO_LONG=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import openai
import pytest

from registry import Artifact, Registry
from registry.manifest import Probe
from tests.e2e.service import running
from tests.sizes import LONG, size
from tune import publication
from tune.probes import make_probes
from tune.recipe_file import parse_recipe
from tune.session import run

pytestmark = [pytest.mark.engine, pytest.mark.training]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUM_PROBES = size(25, 100)
SFT = {"kind": "sft", "data": [{"path": "tasks/support/train.jsonl"}], "max_steps": 12, "learning_rate": 3e-3}
SLOW_SFT = SFT | {"learning_rate": 3e-4}
TEXT = {"kind": "cpt", "data": [{"path": "modes/corpus.jsonl"}], "max_steps": 3, "max_length": 256}
DPO = {"kind": "dpo", "data": [{"path": "modes/preferences.jsonl"}], "max_steps": 6, "learning_rate": 1e-3}
PATTERNS = {"rank_pattern": {r"layers\.5\.mlp\..*": 16}, "alpha_pattern": {"q_proj": 4, "v_proj": 24}}

ADAPTERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "patterns": ({"kind": "lora", "rank": 8, "use_rslora": True, **PATTERNS}, [SFT]),
    "qlora": ({"kind": "qlora"}, [SFT]),
    "extracted": ({"kind": "dora", "extract_lora_rank": 32}, [SFT]),
    "preferring": ({"kind": "lora", "loraplus_ratio": 4.0}, [TEXT, SFT, DPO]),
}
MODELS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "dora": ({"kind": "dora"}, [SFT]),
}
if LONG:
    ADAPTERS |= {
        "gaussian": ({"kind": "lora", "init": "gaussian"}, [SFT]),
        "orthogonal": ({"kind": "lora", "init": "orthogonal"}, [SFT]),
        "from-full": ({"kind": "full", "extract_lora_rank": 64}, [SLOW_SFT]),
        "from-freeze": ({"kind": "freeze", "last_layers": 2, "extract_lora_rank": 64}, [SLOW_SFT]),
    }
    MODELS |= {
        "full": ({"kind": "full"}, [SLOW_SFT]),
        "freeze": ({"kind": "freeze", "last_layers": 2}, [SLOW_SFT]),
    }


@dataclass(frozen=True)
class Trained:
    artifact: Artifact
    answers: list[Probe]
    """Of the model as the trainer holds it when it publishes."""


def train(name: str, method: dict[str, Any], stages: list[dict[str, Any]], data_dir: Path) -> Trained:
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


def assert_answers_are_the_trainers(client: openai.OpenAI, trained: Trained) -> None:
    probes = trained.answers
    assert len(probes) == NUM_PROBES
    assert sum(len(probe.completion_token_ids) for probe in probes) > 2 * NUM_PROBES
    assert len({tuple(probe.completion_token_ids) for probe in probes}) > 1
    for probe in probes:
        expected = probe.completion_token_ids
        reply = client.completions.create(
            model=trained.artifact.revision,
            prompt=probe.prompt_token_ids,
            max_tokens=len(expected),
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        assert reply.choices[0].model_extra is not None
        assert reply.choices[0].model_extra["token_ids"] == expected, probe.prompt_token_ids


@pytest.fixture(scope="module")
def service_with_adapters(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[openai.OpenAI, dict[str, Trained]]]:
    data_dir = tmp_path_factory.mktemp("adapters")
    trained = {name: train(name, method, stages, data_dir) for name, (method, stages) in ADAPTERS.items()}
    rank = max(made.artifact.manifest.lora.rank for made in trained.values() if made.artifact.manifest.lora is not None)
    with running(data_dir, "--workers", "0", "--", "--max-lora-rank", str(rank)) as service:
        yield service.client, trained


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_every_method_serves_hot_and_answers_what_the_trainer_answered(
    service_with_adapters: tuple[openai.OpenAI, dict[str, Trained]], name: str
) -> None:
    client, trained = service_with_adapters
    assert trained[name].artifact.manifest.kind == "lora"
    assert_answers_are_the_trainers(client, trained[name])


@pytest.mark.parametrize("name", MODELS)
def test_whole_weights_serve_as_a_base_and_answer_what_the_trainer_answered(name: str, tmp_path: Path) -> None:
    trained = train(name, *MODELS[name], tmp_path)
    assert trained.artifact.manifest.kind == "merged"
    with running(tmp_path, "--workers", "0", "--model", trained.artifact.revision) as service:
        assert_answers_are_the_trainers(service.client, trained)
