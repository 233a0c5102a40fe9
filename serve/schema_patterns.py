"""Which regular expressions of a JSON schema (``pattern``, ``patternProperties``) xgrammar 0.2.8 holds to.

It matches the whole string, as if anchored at both ends. It drops what it does not know without a word (anchors within
the pattern, look-around), takes ``\\d``, ``\\w`` and ``\\s`` as ASCII only, and writes a backslash or a quotation mark
into the answer unescaped where the pattern demands one (cpp/json_schema_converter.cc, ``RegexExpression``). So only a
part of the language is taken, in which a match is a match for every validator.
"""

from __future__ import annotations

import re

_SETS = "dws"
_CONTROLS = "nrtfv"
_UNWRITABLE = '"\\'
_QUANTIFIERS = "*+?{"
_COUNT = re.compile(r"\{[0-9]+(,[0-9]*)?\}")
"""Any other is a literal brace to JSON Schema, and a repetition to xgrammar."""


def unenforced(pattern: str) -> str | None:
    """What of ``pattern`` is not held, as the end of the sentence "it has ..."; ``None``: all is."""
    is_ascii = pattern.isascii()
    if not pattern.isprintable():
        return "a control character"
    if not is_ascii and ("." in pattern or "[^" in pattern or "\\" in pattern):
        return "a dot, [^...] or a backslash beside characters that are not ASCII"
    depth, position, is_quantified, is_lazy = 0, 0, False, False
    while position < len(pattern):
        character, rest = pattern[position], pattern[position + 1 :]
        width = 1
        if character in _QUANTIFIERS:
            if is_quantified and (character != "?" or is_lazy):
                return f"{character} after another quantifier"
            if character == "{":
                count = _COUNT.match(pattern, position)
                if count is None:
                    return "a { that begins no {n}, {n,} or {n,m}"
                width = len(count[0])
        elif character == "\\":
            if not rest or (rest[0].isalnum() and rest[0] not in _SETS) or rest[0] in _UNWRITABLE:
                return f"\\{rest[:1]}"
            width = 2
        elif character == "[":
            width, reason = _character_class(pattern, position, is_ascii=is_ascii)
            if reason:
                return reason
        elif character == "(":
            depth += 1
            if rest.startswith("?"):
                if not rest.startswith("?:"):
                    return f"({rest[:2]}"
                width = 3
        elif character == ")":
            depth -= 1
        elif character == "^":
            if position and (depth or pattern[position - 1] != "|"):
                return "^ within"
        elif character == "$":
            if rest and (depth or rest[0] != "|"):
                return "$ within"
        elif character == '"':
            return "a quotation mark"
        is_quantified, is_lazy = character in _QUANTIFIERS, is_quantified
        position += width
    return None


def _character_class(pattern: str, start: int, *, is_ascii: bool) -> tuple[int, str | None]:
    """Of the class that begins at ``start``: how many characters it is written with, and what of it is not held."""
    position = start + 1
    is_negated = pattern[position : position + 1] == "^"
    position += is_negated
    can_be_written = is_negated
    before, after_set = "", False
    while position < len(pattern) and pattern[position] != "]":
        character = pattern[position]
        is_set = False
        if character == "[":
            return 0, "[ within [...]"
        if character == "\\":
            position += 1
            character = pattern[position : position + 1]
            is_set = character in _SETS and bool(character)
            if not character or (character.isalnum() and not is_set and character not in _CONTROLS):
                return 0, f"[\\{character}]"
            if is_set and is_negated:
                return 0, f"[^\\{character}]"
            if character not in _CONTROLS and character not in _UNWRITABLE:
                can_be_written = True
        elif character == "-" and pattern[position + 1 : position + 2] not in ("]", "") and (before or after_set):
            if after_set:
                return 0, f"a range that begins with \\{before}"
            last = pattern[position + 1]
            if last == "\\":
                return 0, "a range that ends with a backslash"
            if not is_ascii and any(before <= unwritable <= last for unwritable in _UNWRITABLE):
                return 0, "a range over quotation mark or backslash beside characters that are not ASCII"
            position, before = position + 2, ""
            can_be_written = True
            continue
        elif character not in _UNWRITABLE:
            can_be_written = True
        elif not is_ascii:
            return 0, "a quotation mark"
        before, after_set = character, is_set
        position += 1
    if position >= len(pattern):
        return 0, "a [ that is not closed"
    if not can_be_written:
        return 0, "[...] of nothing that a JSON string can hold unescaped"
    return position + 1 - start, None
