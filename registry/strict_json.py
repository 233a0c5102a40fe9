"""JSON as the standard has it: no repeated keys, no NaN or infinity, no nesting that exhausts the stack."""

from __future__ import annotations

import json
import math
from collections import Counter

_SHOWN_CHARACTERS = 80
"""Of a key or number in a message: it may be megabytes long."""


def parse_strict_json(data: bytes) -> object:
    """The value that ``data`` (UTF-8) stands for.

    Raises:
        ValueError: it is not JSON, or repeats a key, or holds NaN, an infinity or a number that Python would read as
            one; the message says which.
    """
    try:
        value: object = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        times = Counter(key for key, _ in pairs)
        twice = next(key for key in times if times[key] > 1)
        raise ValueError(f"an object repeats a key: {twice[:_SHOWN_CHARACTERS]!r} is given twice")
    return unique


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:_SHOWN_CHARACTERS]} is too large: no float holds it")
    return value
