"""Exports, made and verified by Capo, serve in the real engine: a GPTQ copy of a base, which takes the base's adapters;
an adapter merged into its base; an adapter extracted from that again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from registry import Artifact, Registry
from registry.errors import InvalidArtifactError
from tests.e2e.service import Service, running
from tests.e2e.trained import SFT, Trained, assert_answers_are_the_trainers, train

pytestmark = [pytest.mark.engine, pytest.mark.training, pytest.mark.beside, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "tasks"
MAX_TOKENS = 16
CLEAR_MARGIN = 1.0
"""Between the two highest logits in float32; the engine computes in bfloat16, whose steps are 0.125 at 16 to 32."""


@dataclass(frozen=True)
class Served:
    service: Service
    registry: Registry
    quantized: Artifact
    adapter: Artifact


@pytest.fixture(scope="module")
def trained(service: Service) -> Trained:
    """An adapter in the registry of the session's service, whose base is not quantised."""
    return train("briefly", {"kind": "lora"}, [SFT | {"max_steps": 25}], service.data_dir)


@pytest.fixture(scope="module")
def merged(service: Service, trained: Trained) -> Artifact:
    from tune.exports.session import export, locate_source, rows_for
    from tune.exports.settings import MergeExport

    source = locate_source(trained.artifact.revision, service.registry)
    rows = rows_for(source, data=EXAMPLES / "support" / "held_out.jsonl", directories=[], max_rows=20)
    return export(source, MergeExport(name="tiny-merged"), rows, registry=service.registry)


@pytest.fixture(scope="module")
def served(service: Service, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from tune.exports.session import export, locate_source, rows_for
    from tune.exports.settings import GptqExport

    registry, adapter = service.registry, trained.artifact
    source = locate_source("capo-tiny", registry)
    rows = rows_for(source, data=EXAMPLES / "support" / "train.jsonl", directories=[], max_rows=40, calibration_rows=32)
    quantized = export(source, GptqExport(name="tiny-gptq"), rows, registry=registry)
    with serving(quantized, registry, tmp_path_factory.mktemp("quantized")) as over_quantized:
        yield Served(over_quantized, registry, quantized, adapter)


def serving(model: Artifact, registry: Registry, data_dir: Path) -> AbstractContextManager[Service]:
    """A service of its own that has ``model`` as its base, on the same registry."""
    return running(data_dir, "--model", model.revision, "--registry", str(registry.root), "--workers", "0")


def test_a_merged_adapter_serves_as_a_base_and_answers_what_the_trainer_answered(
    service: Service, trained: Trained, merged: Artifact, tmp_path: Path
) -> None:
    with serving(merged, service.registry, tmp_path) as over_merged:
        assert_answers_are_the_trainers(over_merged.client, trained, model=merged.revision)


def test_an_extracted_adapter_serves_hot_and_answers_what_the_trainer_answered(
    service: Service, trained: Trained, merged: Artifact
) -> None:
    """Hot: it is published while the service runs."""
    from tune.exports.session import export, locate_source, rows_for
    from tune.exports.settings import LoraExport

    source = locate_source(merged.revision, service.registry)
    rows = rows_for(source, data=EXAMPLES / "support" / "held_out.jsonl", directories=[], max_rows=20)
    extracted = export(source, LoraExport(name="tiny-extracted"), rows, registry=service.registry)
    assert extracted.manifest.kind == "lora"
    assert_answers_are_the_trainers(service.client, trained, model=extracted.revision)
    with pytest.raises(AssertionError):  # the base answers otherwise, so it is the adapter that was heard
        assert_answers_are_the_trainers(service.client, trained, model="capo-tiny")


def prompts() -> list[list[dict[str, Any]]]:
    lines = (EXAMPLES / "support" / "held_out.jsonl").read_text().splitlines()[:12]
    return [json.loads(line)["messages"][:-1] for line in lines]


def engine_tokens(served: Served, model: str, messages: list[dict[str, Any]]) -> list[int]:
    reply = served.service.client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=MAX_TOKENS,
        extra_body={"return_token_ids": True},
    )
    return reply.choices[0].token_ids  # type: ignore[attr-defined]


def clear_tokens(model: Any, tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """Greedy tokens up to the first one that wins by less than the margin."""
    import torch

    ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    found: list[int] = []
    with torch.no_grad():
        while len(found) < MAX_TOKENS:
            best = model(input_ids=torch.tensor([ids + found])).logits[0, -1].topk(2)
            if float(best.values[0] - best.values[1]) < CLEAR_MARGIN:
                break
            found.append(int(best.indices[0]))
            if found[-1] == tokenizer.eos_token_id:
                break
    return found


def test_the_engine_answers_from_the_quantised_weights_and_takes_an_adapter_of_their_base(served: Served) -> None:
    """Both as the unpacked weights say, computed in float32 by another program."""
    from transformers import AutoTokenizer

    from tune.evaluation.loading import load

    tokenizer = AutoTokenizer.from_pretrained(served.quantized.path)
    compared = 0
    answers: dict[str, list[list[int]]] = {}
    for model, adapter_dir in ((served.quantized.revision, None), (served.adapter.revision, served.adapter.path)):
        unpacked = load(served.quantized.path, adapter_dir)
        answers[model] = [engine_tokens(served, model, messages) for messages in prompts()]
        for messages, given in zip(prompts(), answers[model], strict=True):
            expected = clear_tokens(unpacked, tokenizer, messages)
            assert given[: len(expected)] == expected
            compared += len(expected)
    assert compared >= 50, "too few clear tokens to prove anything"
    assert answers[served.quantized.revision] != answers[served.adapter.revision], "the adapter changes nothing"


def test_what_was_measured_stands_in_the_manifest_and_in_the_report(served: Served) -> None:
    manifest = served.quantized.manifest
    assert manifest.kind == "gptq"
    assert 0 < manifest.metrics["verification.kl"] < 0.15
    report = json.loads((served.quantized.path / "report.json").read_text())
    assert report["figures"]["measured"]["kl"] == manifest.metrics["verification.kl"]
    assert served.registry.verify(served.quantized.revision) == []


def test_the_artifact_names_no_path_of_this_machine_and_is_not_quantised_again(served: Served) -> None:
    from tune.exports.session import export, locate_source, rows_for
    from tune.exports.settings import GptqExport

    config = (served.quantized.path / "config.json").read_text()
    assert "/tmp" not in config
    assert "/" not in json.dumps(json.loads(config)["quantization_config"])
    source = locate_source(served.quantized.revision, served.registry)
    rows = rows_for(source, data=EXAMPLES / "support" / "held_out.jsonl", directories=[], max_rows=8)
    with pytest.raises(InvalidArtifactError, match="is quantised"):
        export(source, GptqExport(), rows, registry=served.registry)


TASK = """task: answers
dataset_path: json
dataset_kwargs:
  data_files:
    test: answers.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
"""


@pytest.mark.filterwarnings("ignore")
def test_a_benchmark_gives_the_served_model_the_score_of_the_same_weights_in_memory(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    from tune.evaluation.benchmarks import run_on_endpoint, run_on_model
    from tune.evaluation.loading import load
    from tune.evaluation.settings import Benchmark

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = [json.loads(line)["messages"] for line in (EXAMPLES / "support" / "train.jsonl").read_text().splitlines()]
    rows = [
        {"question": asked[-2]["content"], "choices": [asked[-1]["content"], other[-1]["content"]], "label": 0}
        for asked, other in zip(lines[:16], lines[100:116], strict=True)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "answers.yaml").write_text(TASK)
    benchmarks = [Benchmark(task="answers", file=Path("answers.yaml"))]
    tokenizer = AutoTokenizer.from_pretrained(served.quantized.path)
    in_memory = run_on_model(
        load(served.quantized.path, served.adapter.path), tokenizer, benchmarks, tmp_path, batch_size=4
    )
    over_http = run_on_endpoint(
        served.service.url, served.adapter.revision, served.quantized.path, benchmarks, tmp_path, api_key=None
    )
    assert in_memory.keys() == over_http.keys() == {"benchmarks.answers.acc"}
    # The engine computes in bfloat16, so one close pair of sixteen may fall the other way.
    assert abs(in_memory["benchmarks.answers.acc"] - over_http["benchmarks.answers.acc"]) <= 1 / 16
