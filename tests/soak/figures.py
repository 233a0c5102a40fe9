"""What the proofs measured, kept beside the machine it was measured on, so that the documentation can quote it."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

DEFAULT_PATH = Path("build/soak.json")

Figure = int | float | str


class Figures:
    """Figures by proof. Written at each :meth:`record`, so that a proof that fails later still shows the earlier ones.

    Full and short runs are kept apart; a later run of the same proof replaces its figures only.
    """

    def __init__(self, path: Path, *, is_full: bool) -> None:
        self._path = path
        self._form = "full" if is_full else "short"
        self.recorded: dict[str, dict[str, Figure]] = {}

    def record(self, proof: str, **figures: Figure) -> None:
        shown = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
        self.recorded.setdefault(proof, {}).update(shown)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            document = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError):
            document = {}
        document["machine"] = machine()
        measured_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        document.setdefault(self._form, {})[proof] = {"measured_at": measured_at, **self.recorded[proof]}
        self._path.write_text(json.dumps(document, indent=2) + "\n")


def machine() -> dict[str, Figure]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(memory_bytes / 2**30, 1),
        "python": platform.python_version(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
