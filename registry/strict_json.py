"""JSON as the standard has it: no repeated keys, no NaN, no nesting that exhausts the stack."""

from __future__ import annotations

import json


def parse_strict_json(data: bytes) -> object:
    """The value that ``data`` (UTF-8) stands for.

    Raises:
        ValueError: it is not JSON, or repeats a key, or holds NaN or an infinity; the message says which.
    """
    try:
        value: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("an object repeats a key")
    return unique


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")
