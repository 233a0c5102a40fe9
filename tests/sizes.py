"""How large the long proofs are: small in the usual suite, full with CAPO_LONG=1 (`make soak`)."""

from __future__ import annotations

import os

LONG = os.environ.get("CAPO_LONG") == "1"


def size(short: int, full: int) -> int:
    return full if LONG else short
