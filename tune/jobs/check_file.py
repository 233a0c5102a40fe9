"""Checking a large training file in a process of its own: ``python -m tune.jobs.check_file PATH``.

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
from tune.data.rows import FileReport, RowError, check_chat_file

REPORTED_ERRORS = 10
IN_PLACE_BYTES = 1024 * 1024
"""Smaller files are checked at once: that takes less time than starting a process."""


def check_training_file(path: Path) -> FileReport:
    """Check every row; the first ten faults are reported. Blocks, without keeping the interpreter busy.

    Raises:
        UnavailableError: the checking process was lost (killed, or no memory for it).
    """
    if path.stat().st_size <= IN_PLACE_BYTES:
        return check_chat_file(path, limit_errors=REPORTED_ERRORS)
    command = [sys.executable, "-m", "tune.jobs.check_file", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise UnavailableError(
            f"the check of the file was interrupted (exit code {done.returncode}); upload it again",
            retry_after_seconds=5.0,
        )
    report = json.loads(done.stdout)
    return FileReport(rows=report["rows"], errors=tuple(RowError(**error) for error in report["errors"]))


def main() -> None:
    os.nice(5)  # serving comes first
    report = check_chat_file(Path(sys.argv[1]), limit_errors=REPORTED_ERRORS)
    json.dump(asdict(report), sys.stdout)


if __name__ == "__main__":
    main()
