"""``capo evaluate``: base against tuned model, now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from capo.cli.asking import api_key
from capo.cli.printing import print_table
from capo.cli.serve import read_settings
from registry import Registry, errors, locate_base_model


def add_to(app: typer.Typer) -> None:
    app.command(name="evaluate")(evaluate)


def evaluate(
    reference: Annotated[str, typer.Argument(help="A revision, alias or ft: name; with --endpoint, as served.")],
    data: Annotated[
        Path | None, typer.Option(help="Chat rows to judge on; default the rows that its own job held out.")
    ] = None,
    general: Annotated[Path | None, typer.Option(help="Rows of what should not be forgotten: their loss.")] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="An lm-eval task: NAME, or NAME=FILE for a task file. May be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per benchmark, at most.")] = None,
    max_rows: Annotated[int, typer.Option(help="Rows, at most.")] = 200,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 128,
    promote_if: Annotated[str | None, typer.Option(help="Exit code 1 unless it holds: 'exact_match > base'.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Run the benchmarks on this service instead, such as http://127.0.0.1:8000.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for report.json and report.html.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Where its base is, if the base's id does not say.")] = None,
    registry: Annotated[Path | None, typer.Option(help="Registry directory; default as for capo serve.")] = None,
) -> None:
    """Measure a tuned model and its base on the same rows, and write a report.

    With --endpoint, a service with keys is asked with that of CAPO_API_KEY.
    """
    from tune.cli import hush_optional_libraries
    from tune.evaluation.promotion import check_promotion
    from tune.evaluation.session import evaluate_endpoint, evaluate_reference
    from tune.evaluation.settings import Benchmark, Evaluation
    from tune.jobs.settings import files_dir

    settings = read_settings(registry_dir=registry)
    opened = Registry(settings.registry_path)
    hush_optional_libraries()
    try:
        asked = Evaluation(
            data=data,
            general=general,
            max_rows=max_rows,
            max_tokens=max_tokens,
            benchmarks=tuple(_benchmark(Benchmark, text, limit) for text in benchmark or ()),
        )
        if promote_if is not None:
            check_promotion(promote_if, asked)
    except ValueError as error:
        raise errors.InvalidRequestError(f"capo evaluate: {error}") from error
    if endpoint is not None:
        if (
            not asked.benchmarks
            or data is not None
            or general is not None
            or promote_if is not None
            or output is not None
        ):
            raise errors.InvalidRequestError("--endpoint runs benchmarks only: give --benchmark, and no rows or gate")
        artifact = opened.resolve(reference)
        base = locate_base_model(base_model or artifact.manifest.base_model.id, opened)
        figures = evaluate_endpoint(endpoint, [base.id, reference], base.path, asked, api_key=api_key())
        _print({"base": figures[base.id], "tuned": figures[reference]})
        return
    outcome = evaluate_reference(
        reference,
        asked,
        registry=opened,
        directories=[Path(), files_dir(settings.data_dir)],
        promote_if=promote_if,
        base_model=base_model,
    )
    _print({column: dict(values) for column, values in outcome.report.figures.items()})
    folder = output or settings.data_dir / "reports" / outcome.report.title
    folder.mkdir(parents=True, exist_ok=True)
    outcome.report.write(folder)
    typer.echo(f"report: {folder / 'report.html'}")
    if outcome.decision is not None:
        typer.echo(outcome.decision.sentence())
        if not outcome.decision.is_promoted:
            raise typer.Exit(1)


def _benchmark(record: type, text: str, limit: int | None) -> object:
    task, _, file = text.partition("=")
    return record(task=task, file=Path(file) if file else None, limit=limit)


def _print(figures: dict[str, dict[str, float]]) -> None:
    table = Table("metric", *figures)
    for metric in dict.fromkeys(name for values in figures.values() for name in values):
        table.add_row(metric, *(f"{values[metric]:.4f}" if metric in values else "-" for values in figures.values()))
    print_table(table)
