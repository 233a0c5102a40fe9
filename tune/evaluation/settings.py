"""What a recipe may ask of the evaluation after training. Imports neither torch nor transformers."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, field_validator

from tune.record import Record

METRICS = (
    *("loss", "perplexity", "token_accuracy"),
    *("exact_match", "f1", "bleu", "rouge1", "rouge2", "rougeL"),
    *("tokens_per_second", "peak_memory_bytes"),
)
"""Figures of every evaluation whose rows ask something."""
GENERAL_METRICS = ("general_loss", "general_perplexity")
_PLAIN = re.compile(r"[^A-Za-z0-9_]")
_TASK_NAME = re.compile(r"[A-Za-z0-9_.,+-]{1,128}")


class Benchmark(Record):
    """One task of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness)."""

    task: str = Field(description="Its name, as lm-eval lists it or as the task file says in 'task:'.")
    file: Path | None = Field(
        None,
        description="A task file (YAML) of your own; None = lm-eval's own tasks, whose data come from the hub. "
        "Relative paths start at the recipe file's directory; one that brings code (!function) is refused.",
    )
    limit: int | None = Field(None, ge=1, description="At most this many documents. None = all.")

    @field_validator("task")
    @classmethod
    def _task_is_a_plain_name(cls, value: str) -> str:
        if not _TASK_NAME.fullmatch(value):
            raise ValueError("a task name has up to 128 letters, digits and '_.,+-'")
        return value


class Evaluation(Record):
    """Base against tuned model once training is done; figures go to the manifest, answers into the report."""

    data: Path | None = Field(
        None,
        description="Chat rows to ask and judge. None = the validation rows of the last stage that has chat rows. "
        "Relative paths start at the recipe file's directory.",
    )
    max_rows: int = Field(
        200,
        ge=1,
        le=100_000,
        description="Rows at most, the first ones; 200 answers give a share to within 7 points (two standard errors) "
        "and cost a minute where training costs an hour.",
    )
    max_tokens: int = Field(128, ge=1, le=8192, description="Of a generated answer.")
    batch_size: int = Field(16, ge=1, le=1024, description="Prompts that are answered together.")
    general: Path | None = Field(
        None,
        description="Text or chat rows of what the model should not forget: their loss before and after. "
        "Relative paths start at the recipe file's directory.",
    )
    benchmarks: tuple[Benchmark, ...] = Field((), max_length=32, description="lm-eval tasks, run on both models.")


def benchmark_metric(task: str, metric: str) -> str:
    """``benchmarks.<task>.<metric>``, with every character that no name of an expression can have turned into ``_``."""
    return f"benchmarks.{_PLAIN.sub('_', task)}.{_PLAIN.sub('_', metric)}"
