"""What an evaluation computes with, the extra ``eval``, and whether it is here. Imports none of it at import."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec

from registry.errors import InvalidRequestError
from tune.evaluation.settings import Evaluation

TEXT_FIGURES = ("sacrebleu", "rouge_score.rouge_scorer")
"""Of every evaluation."""
BENCHMARKS = ("lm_eval",)


def libraries_of(evaluation: Evaluation) -> tuple[str, ...]:
    """Modules that the evaluation imports."""
    return (*TEXT_FIGURES, *(BENCHMARKS if evaluation.benchmarks else ()))


def check_installed(evaluation: Evaluation, *, param: str) -> None:
    """For who will not evaluate, and should not spend the seconds that importing takes.

    Raises:
        InvalidRequestError: a library is missing.
    """
    packages = [name.partition(".")[0] for name in libraries_of(evaluation)]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise _missing(missing, param)


def import_libraries(names: Collection[str], *, param: str = "evaluation") -> None:
    """For who will evaluate: also what a library itself needs is then known to be here.

    Raises:
        InvalidRequestError: one of them cannot be imported; no other attempt on this machine would find it.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise _missing([error.name or name], param) from error


def _missing(names: Collection[str], param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param} needs {' and '.join(names)}, which {'are' if len(names) > 1 else 'is'} not installed; install "
        "capo-llm[eval] where training runs, or leave it out",
        code="evaluation_unavailable",
        param=param,
    )
