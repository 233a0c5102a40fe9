"""Calls of tools in Hermes' form, as a stream tells of them while they are written.

vLLM 0.32 takes the first ``"name":`` for the tool's and all that stands behind ``"arguments":`` for the arguments. With
keys in another order, or more of them, a stream calls another tool, or one with arguments that are no JSON. And it
tells of a call whose arguments never come, which is text in a whole answer.
"""

from __future__ import annotations

import json
from typing import Any

_DECODER = json.JSONDecoder()


def use(parser: Any) -> None:
    """Repair vLLM's ``Hermes2ProToolParser``."""

    def name(call: str) -> str | None:
        """``None``: not yet."""
        members = _members(call)
        try:
            return str(json.loads(members["name"])) if members.get("arguments") else None
        except (KeyError, ValueError):
            return None

    def arguments(call: str, is_complete: bool) -> str | None:
        """As far as they are written."""
        return _members(call).get("arguments")

    parser._extract_tool_name, parser._extract_tool_args = staticmethod(name), staticmethod(arguments)


def _members(text: str) -> dict[str, str]:
    """The values of an object as they are written; the last one may be the beginning of one."""
    found: dict[str, str] = {}
    rest = text
    while rest[:1] in ("{", ","):
        try:
            key, end = _DECODER.raw_decode(rest[1:].lstrip())
            rest = rest[1:].lstrip()[end:].lstrip()
        except ValueError:
            break
        if not isinstance(key, str) or rest[:1] != ":":
            break
        rest = rest[1:].lstrip()
        try:
            _, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            end = len(rest)
        found[key], rest = rest[:end], rest[end:].lstrip()
    return found
