"""How the process of ``capo serve`` ends once its server has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

A_THREAD_IS_STUCK = """
import asyncio, sys, time
from capo.cli import app
from capo.server import CapoServer

async def run(self, on_ready):
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)
    print("the server has ended")

CapoServer.run = run
app(["serve", "--role", "control", "--data-dir", sys.argv[1]])
"""


def test_a_thread_that_cannot_be_stopped_does_not_hold_the_end(tmp_path: Path) -> None:
    """As the one that builds an engine again when SIGTERM comes."""
    command = [sys.executable, "-c", A_THREAD_IS_STUCK, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "the server has ended" in ended.stdout
