"""How many GPUs this process may use, without asking a driver: that would open CUDA, and break it in every fork."""

from __future__ import annotations

import os
from pathlib import Path

_DEVICES = "nvidia[0-9]*"


def visible_gpus(devices: Path = Path("/dev")) -> int:
    """Those of CUDA_VISIBLE_DEVICES, or every one whose device file is here."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob(_DEVICES))
    names = [name.strip() for name in chosen.split(",")]
    # CUDA takes the names up to the first one that is none.
    ends = [index for index, name in enumerate(names) if name in ("", "-1")]
    return min(ends, default=len(names))
