"""The command line. Each command imports what it needs when it runs, so that ``capo --help`` is quick."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.text import Text

from capo.cli import chat, data, demo, evaluate, export, jobs, keys, plan, registry, serve, tune, webhooks, worker
from capo.cli.printing import plain_console
from registry.errors import CapoError

app = typer.Typer(
    name="capo",
    help="Fine-tune adapters for one base model and serve them all from one vLLM engine, by name.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
serve.add_to(app)
tune.add_to(app)
evaluate.add_to(app)
app.add_typer(export.app, name="export")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(registry.app, name="registry")
app.add_typer(data.app, name="data")
chat.add_to(app)
demo.add_to(app)
worker.add_to(app)
plan.add_to(app)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"capo {version('capo-llm')}")
        raise typer.Exit


@app.callback()
def _of_all(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What stands before a command."""


def main() -> None:
    """Entry point. An expected error is one line on standard error and exit code 2; a bug keeps its traceback."""
    try:
        app()
    except CapoError as error:
        where = f" (line {error.line})" if error.line is not None else ""
        plain_console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {error.message}{where}"))
        sys.exit(2)
