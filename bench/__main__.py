"""``python -m bench [serving|training]``: run a benchmark and print its tables as Markdown."""

from __future__ import annotations

import argparse
from pathlib import Path

parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
parser.add_argument("what", nargs="?", choices=("serving", "training"), default="serving")
parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement of serving")
parser.add_argument("--output", type=Path, help="also write the tables to this file")
given = parser.parse_args()
if given.what == "serving":
    from bench.serving import run

    report = run(given.seconds)
else:
    from bench import training

    report = training.run()
print(report)
if given.output is not None:
    given.output.write_text(report)
