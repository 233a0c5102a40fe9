"""What vLLM's event loop would do for each request of a constraint is timed, and bounded, by itself."""

from __future__ import annotations

from typing import Any

import pytest

from serve.constraints import SLOWEST_READING_SECONDS
from serve.vllm_plugin.constraint_trial import read


def schema_of(number: int, **string: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"a{each}": string for each in range(number)}, "required": ["a0"]}


NESTED = {f"a{each}": {"type": "string", "pattern": f"^((a{{1,100}}){{1,100}}){{1,{50 + each}}}$"} for each in range(6)}
RANGES = {f"a{each}": {"type": "number", "minimum": -9.123456 - each, "maximum": 71992.547409} for each in range(500)}


@pytest.mark.parametrize("properties", [NESTED, RANGES], ids=["nested repetitions", "ranges of numbers"])
def test_a_schema_that_takes_long_to_read_is_refused_however_cheap_it_is_then(properties: dict[str, Any]) -> None:
    with pytest.raises(TimeoutError, match="s to read, at each request"):
        read("json", {"type": "object", "properties": properties}, SLOWEST_READING_SECONDS)


@pytest.mark.parametrize(
    ("kind", "specification"),
    [
        ("json", schema_of(700, type="string", description="of which there are many")),
        ("json", schema_of(50, type="number", minimum=0, maximum=1)),
        ("regex", "^[A-Z]{2,3}-[0-9]+$"),
        ("choice", [f"choice {number}" for number in range(1024)]),
        ("json_object", True),
    ],
    ids=lambda value: str(value)[:30],
)
def test_ordinary_ones_are_not(kind: str, specification: Any) -> None:
    read(kind, specification, SLOWEST_READING_SECONDS)
