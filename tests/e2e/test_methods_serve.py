"""What every training method publishes serves, and answers what the trainer answered.

15 prompts for each of a few methods; 100 for all of them with CAPO_LONG=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.service import running
from tests.e2e.trained import SFT, Trained, assert_answers_are_the_trainers, train
from tests.sizes import LONG

pytestmark = [pytest.mark.engine, pytest.mark.training, pytest.mark.beside]

SLOW_SFT = SFT | {"learning_rate": 3e-4}
TEXT = {"kind": "cpt", "data": [{"path": "modes/corpus.jsonl"}], "max_steps": 3, "max_length": 256}
DPO = {"kind": "dpo", "data": [{"path": "modes/preferences.jsonl"}], "max_steps": 6, "learning_rate": 1e-3}
PATTERNS = {"rank_pattern": {r"layers\.5\.mlp\..*": 16}, "alpha_pattern": {"q_proj": 4, "v_proj": 24}}

ADAPTERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "patterns": ({"kind": "lora", "rank": 8, "use_rslora": True, **PATTERNS}, [SFT]),
    "qlora": ({"kind": "qlora"}, [SFT]),
    "preferring": ({"kind": "lora", "loraplus_ratio": 4.0}, [TEXT, SFT, DPO]),
}
MODELS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "dora": ({"kind": "dora"}, [SFT]),
}
if LONG:
    ADAPTERS |= {
        "extracted": ({"kind": "dora", "extract_lora_rank": 32}, [SFT]),
        "gaussian": ({"kind": "lora", "init": "gaussian"}, [SFT]),
        "orthogonal": ({"kind": "lora", "init": "orthogonal"}, [SFT]),
        "from-full": ({"kind": "full", "extract_lora_rank": 64}, [SLOW_SFT]),
        "from-freeze": ({"kind": "freeze", "last_layers": 2, "extract_lora_rank": 64}, [SLOW_SFT]),
    }
    MODELS |= {
        "full": ({"kind": "full"}, [SLOW_SFT]),
        "freeze": ({"kind": "freeze", "last_layers": 2}, [SLOW_SFT]),
    }


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
