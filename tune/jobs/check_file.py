"""Checking a large training file in a process of its own: ``python -m tune.jobs.check_file PATH ROWS``.

The check is pure Python. In a thread it would hold the interpreter's lock for up to minutes, in turns of 5 ms
(``sys.getswitchinterval``), and every token that this process streams would wait for its turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from registry.errors import UnavailableError
from tune.data.faults import RowFault
from tune.data.formats import detect_format, parse_object
from tune.data.rows import FileReport, RowError, check_rows, decode_object, open_file, parse_chat_row, read_lines
from tune.jobs.records import RowFormat

REPORTED_ERRORS = 10
IN_PLACE_BYTES = 1024 * 1024
"""Smaller files are checked at once: that takes less time than starting a process."""


def row_format(path: Path) -> RowFormat:
    """What the first row is; ``chat``, OpenAI's own, where that cannot be told."""
    with open_file(path) as file:
        for line, raw in read_lines(file):
            try:
                found = detect_format(decode_object(raw, line)) if isinstance(raw, bytes) else None
            except RowFault:
                found = None
            return found if found == "preference" or found == "text" else "chat"
    return "chat"


def check_training_file(path: Path, *, max_rows: int) -> FileReport:
    """Check every row against the first one's format and report the first ten faults; ends at the first row too many.

    Blocks, without keeping the interpreter busy.

    Raises:
        UnavailableError: the checking process was lost (killed, or no memory for it).
    """
    if path.stat().st_size <= IN_PLACE_BYTES:
        return _check(path, max_rows)
    command = [sys.executable, "-m", "tune.jobs.check_file", str(path), str(max_rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise UnavailableError(
            f"the check of the file was interrupted (exit code {done.returncode}); upload it again",
            retry_after_seconds=5.0,
        )
    report = json.loads(done.stdout)
    return FileReport(rows=report["rows"], errors=tuple(RowError(**error) for error in report["errors"]))


def _check(path: Path, max_rows: int) -> FileReport:
    form = row_format(path)
    if form == "chat":
        return check_rows(path, parse_chat_row, REPORTED_ERRORS, max_rows=max_rows)

    def parse(raw: bytes, line: int) -> object:
        return parse_object(decode_object(raw, line), line, form)

    return check_rows(path, parse, REPORTED_ERRORS, max_rows=max_rows)


def main() -> None:
    os.nice(5)  # serving comes first
    report = _check(Path(sys.argv[1]), int(sys.argv[2]))
    json.dump(asdict(report), sys.stdout)


if __name__ == "__main__":
    main()
