"""Numbers within bounds, as xgrammar 0.2.8 writes them: with at most six decimals."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import ceil, floor
from typing import Any

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
DECIMALS = 6


def has_a_decimal(schema: Mapping[str, Any]) -> bool:
    """Where there is none, xgrammar writes nothing at all for the number. The bounds are finite numbers."""
    step = 10**DECIMALS
    bounds = {name: Fraction(schema[name]) * step for name in BOUNDS if name in schema}
    lowest = [ceil(bounds["minimum"])] if "minimum" in bounds else []
    lowest += [floor(bounds["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in bounds else []
    highest = [floor(bounds["maximum"])] if "maximum" in bounds else []
    highest += [ceil(bounds["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in bounds else []
    return not lowest or not highest or max(lowest) <= min(highest)
