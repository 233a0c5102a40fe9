"""Consoles that print what they are given: Rich reads ``[x]`` as markup, and ``ft:tiny:capo:rocket:1`` as an emoji."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

_WIDEST_COLUMNS = 10_000


def plain_console(*, stderr: bool = False) -> Console:
    """Lines are as long as they are: what reads them from a pipe must not find them broken at 80 columns."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Within the terminal; where there is none, as wide as the table is."""
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDEST_COLUMNS
    console.print(table)
