"""A whole run with an evaluation, a gate and an export: what moves, and what the artifact then holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import Registry
from registry.errors import InvalidRequestError, ModelNotFoundError
from tests.tune.samples import chat_rows, text_rows, write_jsonl
from tune.exports.session import export
from tune.progress import StepMetrics, TrainingEvent
from tune.recipe_file import parse_recipe
from tune.session import run


class Heard:
    def __init__(self) -> None:
        self.events: list[TrainingEvent] = []

    def on_event(self, event: TrainingEvent) -> None:
        self.events.append(event)

    def on_step(self, metrics: StepMetrics) -> None:
        del metrics


def recipe(tmp_path: Path, base_dir: Path, **more: Any) -> Any:
    write_jsonl(tmp_path / "rows.jsonl", chat_rows(40))
    write_jsonl(tmp_path / "general.jsonl", text_rows(10))
    stage = {"kind": "sft", "data": [{"path": "rows.jsonl"}], "validation": {"share": 0.2}, "max_steps": 12}
    return parse_recipe(
        {
            "name": "colours",
            "base_model": str(base_dir),
            "stages": [stage | {"learning_rate": 5e-3}],
            "promote_alias": "colours-live",
            "evaluation": {"general": "general.jsonl", "max_tokens": 8},
            **more,
        }
    )


def test_a_run_reports_base_against_tuned_moves_its_alias_and_makes_its_exports(tmp_path: Path, base_dir: Path) -> None:
    heard, registry = Heard(), Registry(tmp_path / "registry")
    loose = {"max_kl": 1e-12, "min_top1_agreement": 1.0}
    asked = recipe(
        tmp_path,
        base_dir,
        promote_if="loss < base - 0.1",
        exports=[{"kind": "merge", "dtype": "float32"}, {"kind": "merge", "dtype": "bfloat16", "thresholds": loose}],
    )
    result = run(asked, registry=registry, work_dir=tmp_path / "work", observer=heard, recipe_dir=tmp_path)
    assert registry.resolve("colours-live") == result.artifact
    metrics = result.artifact.manifest.metrics
    assert metrics["promotion.is_promoted"] == 1.0
    # The same rows through the training's own code.
    assert metrics["evaluation.tuned.loss"] == pytest.approx(metrics["1-sft.valid_loss"], abs=1e-4)
    assert metrics["evaluation.base.loss"] == pytest.approx(metrics["1-sft.base_valid_loss"], abs=1e-4)
    assert metrics["evaluation.base.general_loss"] != metrics["evaluation.tuned.general_loss"]
    report = json.loads((result.artifact.path / "report.json").read_text())
    assert [point["step"] for point in report["curve"]] == list(range(1, 13))
    assert len(report["answers"]) == 8
    assert "report.html" in result.artifact.manifest.files
    merged = registry.artifacts("colours-merged")
    assert [artifact.manifest.dtype for artifact in merged] == ["float32"]
    assert merged[0].manifest.parents == [result.artifact.revision]
    failed = [
        event.message for event in heard.events if event.level == "warn" and "export merge failed" in event.message
    ]
    assert len(failed) == 1
    assert "is not published" in failed[0]


def test_an_export_that_runs_out_of_memory_is_told_and_the_next_one_is_made(
    tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [torch.OutOfMemoryError("CUDA out of memory")]

    def export_once_failed(*arguments: Any, **named: Any) -> Any:
        if failing:
            raise failing.pop()
        return export(*arguments, **named)

    monkeypatch.setattr("tune.evaluation.after_training.export", export_once_failed)
    heard, registry = Heard(), Registry(tmp_path / "registry")
    asked = recipe(tmp_path, base_dir, exports=[{"kind": "merge", "name": "first"}, {"kind": "merge"}], evaluation=None)
    run(asked, registry=registry, work_dir=tmp_path / "work", observer=heard, recipe_dir=tmp_path)
    warnings = [event.message for event in heard.events if event.level == "warn" and "export" in event.message]
    assert warnings == ["export merge failed: OutOfMemoryError; the log of the training has more"]
    assert len(registry.artifacts("colours-merged")) == 1
    assert registry.artifacts("first") == []


def test_a_gate_that_does_not_hold_leaves_the_alias_and_still_publishes(tmp_path: Path, base_dir: Path) -> None:
    heard, registry = Heard(), Registry(tmp_path / "registry")
    asked = recipe(tmp_path, base_dir, promote_if="loss < base - 100")
    result = run(asked, registry=registry, work_dir=tmp_path / "work", observer=heard, recipe_dir=tmp_path)
    with pytest.raises(ModelNotFoundError):
        registry.resolve("colours-live")
    assert registry.resolve(result.artifact.revision).manifest.metrics["promotion.is_promoted"] == 0.0
    assert any("does not hold (base.loss = " in event.message for event in heard.events if event.level == "warn")


@pytest.mark.parametrize(
    ("library", "more"),
    [
        ("sacrebleu", {}),
        ("rouge_score.rouge_scorer", {}),
        ("lm_eval", {"evaluation": {"benchmarks": [{"task": "arc_easy"}]}}),
    ],
)
def test_an_evaluation_whose_library_is_missing_is_refused_before_its_data_are_read(
    tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch, library: str, more: dict[str, Any]
) -> None:
    """And as the request's fault: a job would try again what the machine is to blame for."""
    monkeypatch.setitem(sys.modules, library, None)
    heard, asked = Heard(), recipe(tmp_path, base_dir, **more)
    with pytest.raises(InvalidRequestError, match=f"{library}.* not installed"):
        run(asked, registry=Registry(tmp_path / "r"), work_dir=tmp_path / "work", observer=heard, recipe_dir=tmp_path)
    assert heard.events == []


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"promote_if": "loss < base", "promote_alias": None}, "none is given; set promote_alias"),
        ({"evaluation": {"data": "absent.jsonl"}}, "absent.jsonl"),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused_before_training(
    tmp_path: Path, base_dir: Path, more: dict[str, Any], reason: str
) -> None:
    heard = Heard()
    with pytest.raises((InvalidRequestError, ModelNotFoundError, LookupError), match=reason):
        run(
            recipe(tmp_path, base_dir, **more),
            registry=Registry(tmp_path / "registry"),
            work_dir=tmp_path / "work",
            observer=heard,
            recipe_dir=tmp_path,
        )
    assert not any("trained parameters" in event.message for event in heard.events)
