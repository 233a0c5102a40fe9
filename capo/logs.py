"""Logging of every Capo process: plain lines on standard error, quiet libraries."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: str) -> None:
    """``level`` is for Capo's own loggers; everybody else speaks from warnings up."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for room in ("capo", "serve", "tune", "registry"):
        logging.getLogger(room).setLevel(level.upper())
