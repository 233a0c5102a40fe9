"""``python -m bench``: run the serving benchmark and print its tables as Markdown."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.serving import run

parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement")
parser.add_argument("--output", type=Path, help="also write the tables to this file")
given = parser.parse_args()
report = run(given.seconds)
print(report)
if given.output is not None:
    given.output.write_text(report)
