"""docs/inference-api.md names every field that is honoured or refused, where it says which."""

from __future__ import annotations

import re
from pathlib import Path

from serve.request_fields import ALLOWED, HARMLESS_VALUES, LABELS, REFUSED

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "inference-api.md").read_text()


def named(section: str, until: str = "\n## ") -> set[str]:
    """The fields in backticks below this heading, without the values that stand with some."""
    text = DOCUMENT.partition(f"## {section}")[2].partition(until)[0]
    return {quoted.partition(":")[0] for quoted in re.findall(r"`([a-z_0-9:]+(?: true)?)`", text)}


def test_every_honoured_field_is_named_among_the_honoured() -> None:
    assert set().union(*ALLOWED.values(), LABELS) - named("What is honoured") == set()


def test_every_refused_field_is_named_among_the_refused() -> None:
    of_another_endpoint = {"n", "echo", "prompt"}
    assert (set(REFUSED) | set(HARMLESS_VALUES)) - of_another_endpoint - {"stream_options"} - named(
        "What is refused"
    ) == set()


def test_nothing_is_named_as_refused_that_no_rule_refuses() -> None:
    values = {"auto", "default", "medium", "disabled"}
    instead = {"tools", "tool_choice", "n", "response_format", "structured_outputs"}
    singly = named("What is refused", until="\nPairs of which")
    assert singly - set(REFUSED) - set(HARMLESS_VALUES) - values - instead - {"stream_options"} == set()
