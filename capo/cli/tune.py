"""``capo tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capo.cli.serve import read_settings


def add_to(app: typer.Typer) -> None:
    app.command(name="tune")(tune)


def tune(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a YAML or JSON file.")] = None,
    registry: Annotated[
        Path | None, typer.Option(help="Where the result is published; default as for capo serve.")
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Checkpoints and TensorBoard logs; default capo-data/runs/RECIPE. Resumes what is there."),
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Alias to point to the result.")] = None,
    start_from: Annotated[
        str | None, typer.Option(help="Adapter to go on from: an alias, an ft: name or name@revision.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only print the recipe with every open value filled in, and why.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate memory and time, from a few steps on this machine.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Only print the JSON Schema of recipes.")] = False,
) -> None:
    """Train a recipe here and now, and publish the result. Ctrl-C stops it at the next step, resumable."""
    from tune.cli import explain_recipe, print_schema, rehearse_recipe, tune_recipe
    from tune.progress import StopRequested

    if explain + dry_run + schema > 1:
        raise typer.BadParameter("give one of --explain, --dry-run and --schema")
    if schema:
        print_schema()
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe file; capo tune --schema describes what it may hold")
    settings = read_settings(registry_dir=registry)
    if explain:
        explain_recipe(recipe, settings.registry_path, start_from)
    elif dry_run:
        rehearse_recipe(recipe, settings.registry_path, start_from)
    else:
        try:
            directory = work_dir or settings.data_dir / "runs" / recipe.stem
            tune_recipe(recipe, settings.registry_path, directory, alias, start_from)
        except StopRequested as stop:
            typer.echo(f"stopped ({stop.reason}); run the same command again to go on", err=True)
            raise typer.Exit(130) from stop
