"""``make setup`` where an earlier one did not come to its end. Nothing is downloaded: pip is told of no index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_an_interrupted_environment_is_made_anew_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    for name in ("scripts/setup.sh", "pyproject.toml", "requirements-cpu.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    given = {"CAPO_DEVICE": "cpu", "CAPO_PYTHON": sys.executable, "CC": "true"}
    given |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_INDEX": "1"}

    def setup() -> str:
        done = subprocess.run(
            [tmp_path / "scripts" / "setup.sh"], capture_output=True, text=True, env=os.environ | given
        )
        return done.stderr

    environment = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    assert "No matching distribution found for torch" in setup(), "its own pip was asked, after it was put there"
    mark = environment / "installed-since"
    mark.touch()
    assert "No matching distribution found for torch" in setup()
    assert mark.exists()
