"""``capo demo``."""

from __future__ import annotations

import sys

import typer


def add_to(app: typer.Typer) -> None:
    app.command(name="demo")(demo)


def demo() -> None:
    """Run the main job end to end: upload, tune two adapters, serve them, and compare answers with the base."""
    from capo.demo import run_demo

    sys.exit(run_demo())
