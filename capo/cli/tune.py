"""``capo tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capo.cli.serve import read_settings


def add_to(app: typer.Typer) -> None:
    app.command(name="tune")(tune)


def tune(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    registry: Annotated[
        Path | None, typer.Option(help="Where the result is published; default as for capo serve.")
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Checkpoints and TensorBoard logs; default capo-data/runs/RECIPE. Resumes what is there."),
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Alias to point to the result.")] = None,
) -> None:
    """Train a recipe here and now, and publish the result. Ctrl-C stops it at the next step, resumable."""
    from tune.cli import tune_recipe
    from tune.progress import StopRequested

    settings = read_settings(registry_dir=registry)
    try:
        tune_recipe(recipe, settings.registry_path, work_dir or settings.data_dir / "runs" / recipe.stem, alias)
    except StopRequested as stop:
        typer.echo(f"stopped ({stop.reason}); run the same command again to go on", err=True)
        raise typer.Exit(130) from stop
