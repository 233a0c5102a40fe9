"""The promotion gate's little language: what it says, and that nothing else gets through."""

from __future__ import annotations

import pytest

from registry.errors import InvalidRequestError
from tune.evaluation.promotion import Promotion
from tune.recipe_file import parse_recipe

BASE = {"loss": 2.0, "exact_match": 0.5, "general_loss": 1.0, "benchmarks.arc.acc": 0.4}
TUNED = {"loss": 1.0, "exact_match": 0.56, "general_loss": 1.05, "benchmarks.arc.acc": 0.3}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("exact_match > base + 0.05", True),
        ("exact_match > base + 0.07", False),
        ("tuned.exact_match > base.exact_match", True),
        ("loss < base and general_loss < base.general_loss * 1.1", True),
        ("loss < base and general_loss <= base", False),
        ("loss > base or not general_loss <= base", True),
        ("benchmarks.arc.acc >= base.benchmarks.arc.acc", False),
        ("benchmarks.arc.acc > 0.2 / 2", True),
        ("0.4 < exact_match < 0.6", True),
        ("-loss > -base", True),
        ("(base.loss - loss) / base.loss >= 0.5", True),
    ],
)
def test_an_expression_decides_as_arithmetic_says(expression: str, expected: bool) -> None:
    assert Promotion(expression).decide(base=BASE, tuned=TUNED).is_promoted is expected


def test_a_decision_tells_every_figure_it_looked_at_even_when_the_first_settles_it() -> None:
    decision = Promotion("loss > base and general_loss < 2").decide(base=BASE, tuned=TUNED)
    assert decision.figures == {"tuned.loss": 1.0, "base.loss": 2.0, "tuned.general_loss": 1.05}
    assert "does not hold" in decision.sentence()


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "loss",
        "loss <",
        "loss == base",
        "__import__('os').system('true') < 1",
        "loss < 'base'",
        "loss < True",
        "loss < 1e999",
        "loss < [1][0]",
        "loss < 2 ** 9",
        "loss + exact_match < base",
        "base < 1",
        "(lambda: 1)() < 2",
        "loss < base if loss else base",
        "(" * 300 + "loss < 1" + ")" * 300,
        "loss < 1 and " * 40 + "loss < 1",
    ],
)
def test_anything_else_is_refused_when_it_is_read(expression: str) -> None:
    with pytest.raises(InvalidRequestError, match="promote_if"):
        Promotion(expression)


def test_a_figure_that_is_not_there_and_a_division_by_zero_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"tuned\.bleu was not measured"):
        Promotion("bleu > 1").decide(base=BASE, tuned=TUNED)
    with pytest.raises(InvalidRequestError, match="divides by zero"):
        Promotion("1 / (loss - loss) > 1").decide(base=BASE, tuned=TUNED)


def recipe(**more: object) -> dict[str, object]:
    return {"name": "a", "base_model": "capo-tiny", "stages": [{"kind": "sft", "data": [{"path": "a.jsonl"}]}], **more}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"promote_if": "loss < base"}, "evaluation is not set"),
        ({"promote_if": "exactmatch > base", "evaluation": {}}, "'exactmatch' is not measured; there are bleu"),
        ({"promote_if": "general_loss < base", "evaluation": {}}, "'general_loss' is not measured"),
        ({"promote_if": "benchmarks.arc.acc > base", "evaluation": {}}, "is not measured"),
        ({"exports": [{"kind": "awq"}]}, "CUDA"),
        ({"exports": [{"kind": "gptq", "bits": 3}]}, "4 or 8"),
        ({"exports": [{"kind": "gptq", "bit": 4}]}, "did you mean 'bits'"),
    ],
)
def test_a_recipe_with_a_gate_or_an_export_that_cannot_work_is_refused_at_submission(
    more: dict[str, object], reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        parse_recipe(recipe(**more))


def test_a_recipe_with_a_gate_over_what_will_be_measured_is_taken() -> None:
    evaluation = {"general": "general.jsonl", "benchmarks": [{"task": "arc-easy"}]}
    gate = "loss < base and general_loss < base * 1.1 and benchmarks.arc_easy.acc > base"
    assert parse_recipe(recipe(promote_if=gate, evaluation=evaluation)).promote_if == gate
