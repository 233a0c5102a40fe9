"""Tasks of lm-evaluation-harness, on a model in memory or on a served one.

lm-eval's own tasks take their data from the hub; a local task file may name local files. A task file can carry Python
(``!function``), which would run here, so such a file is refused: what comes from outside is read, never executed.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from registry.errors import InvalidRequestError, NotFoundError
from tune.evaluation.libraries import BENCHMARKS, import_libraries
from tune.evaluation.settings import Benchmark, benchmark_metric

_CODE = re.compile(r"!function|unsafe_code|^\s*class\s*:", re.MULTILINE)


def check(benchmarks: Sequence[Benchmark], directory: Path) -> None:
    """What can be refused before anything is trained.

    Raises:
        NotFoundError: there is no such task file.
        InvalidRequestError: it brings code, or calls its task by another name; or lm-eval is not installed.
    """
    if benchmarks:
        import_libraries(BENCHMARKS, param="evaluation.benchmarks")
    for benchmark in benchmarks:
        if benchmark.file is None:
            continue
        path = directory / benchmark.file
        if not path.is_file():
            raise NotFoundError(f"there is no task file at {benchmark.file}", param="evaluation.benchmarks")
        text = path.read_text(encoding="utf-8")
        if _CODE.search(text):
            raise InvalidRequestError(
                f"the task file {benchmark.file} brings code of its own (!function or class), which is never run here; "
                "write the task with templates only",
                param="evaluation.benchmarks",
            )
        if not re.search(rf"^task:\s*[\"']?{re.escape(benchmark.task)}[\"']?\s*$", text, re.MULTILINE):
            raise InvalidRequestError(
                f"the task file {benchmark.file} has no line 'task: {benchmark.task}'; give the name that stands there",
                param="evaluation.benchmarks",
            )


def run_on_model(
    model: Any, tokenizer: Any, benchmarks: Sequence[Benchmark], directory: Path, *, batch_size: int
) -> dict[str, float]:
    """``benchmarks.<task>.<metric>`` of a model in memory."""
    if not benchmarks:
        return {}
    check(benchmarks, directory)
    from lm_eval.models.huggingface import HFLM

    return _run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), benchmarks, directory)


def run_on_endpoint(
    url: str,
    model: str,
    tokenizer_dir: Path,
    benchmarks: Sequence[Benchmark],
    directory: Path,
    *,
    api_key: str | None,
) -> dict[str, float]:
    """The same of a served model, by name, over OpenAI-compatible ``/v1/completions``. ``url`` ends before ``/v1``."""
    if not benchmarks:
        return {}
    check(benchmarks, directory)
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    served = LocalCompletionsAPI(
        base_url=f"{url.rstrip('/')}/v1/completions",
        model=model,
        tokenizer=str(tokenizer_dir),
        tokenizer_backend="huggingface",
        num_concurrent=1,
        max_retries=3,
        header=None if api_key is None else {"Authorization": f"Bearer {api_key}"},
    )
    return _run(served, benchmarks, directory)


def _run(language_model: Any, benchmarks: Sequence[Benchmark], directory: Path) -> dict[str, float]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    figures: dict[str, float] = {}
    for benchmark in benchmarks:
        include = str((directory / benchmark.file).parent) if benchmark.file is not None else None
        with _hushed(), _in_directory(directory):
            manager = TaskManager(include_path=include, include_defaults=benchmark.file is None)
            try:
                done = lm_eval.simple_evaluate(
                    model=language_model,
                    tasks=[benchmark.task],
                    task_manager=manager,
                    limit=benchmark.limit,
                    bootstrap_iters=0,
                    log_samples=False,
                )
            except (KeyError, ValueError, OSError, ConnectionError) as error:
                raise InvalidRequestError(
                    f"the benchmark {benchmark.task!r} cannot be run: {str(error)[:300]}. Check the name (lm-eval ls "
                    "tasks), the task file's data paths, and that the hub can be reached if its data are there.",
                    param="evaluation.benchmarks",
                ) from error
        assert done is not None, "lm-eval gives results to the first process only, and there is one"
        for key, value in done["results"][benchmark.task].items():
            metric, _, chosen_filter = key.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and chosen_filter:
                figures[benchmark_metric(benchmark.task, metric)] = float(value)
    return figures


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Its progress bars and tables would be drawn over ours."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _in_directory(directory: Path) -> Iterator[None]:
    """Data paths in a task file start where the recipe is."""
    with contextlib.chdir(directory):
        yield
