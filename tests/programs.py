"""Programs that tests run and that pip does not bring. One that is missing is a failure, never a test left out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def program(name: str) -> str:
    """The path of a program: on PATH, or where Debian keeps daemons and PostgreSQL. Fails the test without it."""
    postgres = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(["/usr/sbin", "/sbin", *postgres]))
    if found is None:
        pytest.fail(f"this test needs the program {name}; scripts/test_programs.sh installs it", pytrace=False)
    return found
