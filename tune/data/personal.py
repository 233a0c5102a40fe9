"""Personal data in training text: found by pattern and check digit, and replaced by its kind, ``[EMAIL]`` say.

What a rule can recognise, with few false alarms: e-mail addresses, phone numbers, payment cards, bank accounts (IBAN),
US social security numbers, IP addresses. Names and street addresses need a model and are not found. The judges are
libraries: ``phonenumbers`` (Google's libphonenumber: numbering plans of all countries), ``python-stdnum`` (check
digits and ranges) and the standard library's ``ipaddress``; the patterns here only find candidates for them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import phonenumbers
from stdnum import iban, luhn
from stdnum.us import ssn

from tune.data.formats import AnyRow
from tune.data.preferences import PreferenceRow
from tune.data.rows import TextRow

HOME_REGION = "US"
"""Country whose phone numbers are known without their country code; all others are found when written with ``+``."""

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
_CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-]|\.\d)")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
_SSN = re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(
    r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])"
)  # 2000::/3 is all that is global
_PHONE = re.compile(r"(?<![\w.])(?:\+\d[\d ().-]{6,22}\d|(?:\(\d{3}\)[ .-]?|\d{3}[ .-])\d{3}[ .-]\d{4})(?!\w)")
_DIGITS = re.compile(r"[\d@:]")
_CARD_FIRST_DIGITS = "3456"
"""Of the issuers' ranges (ISO/IEC 7812): American Express, Visa, Mastercard, Discover."""


@dataclass(frozen=True, slots=True)
class Finding:
    kind: str
    start: int
    end: int


def find_personal_data(text: str) -> list[Finding]:
    """What stands in ``text``, in order and without overlaps."""
    if _DIGITS.search(text) is None:
        return []
    found: list[Finding] = []  # of the rules before this one, in order
    for kind, pattern, needed, is_one in _RULES:
        if needed not in text:
            continue
        ends = [one.end for one in found]
        added = []
        for match in pattern.finditer(text):
            following = bisect_right(ends, match.start())  # the first that does not end before the match
            taken = following < len(found) and found[following].start < match.end()
            if not taken and is_one(match.group()):
                added.append(Finding(kind, match.start(), match.end()))
        found = sorted([*found, *added], key=lambda one: one.start)
    return found


def redact(text: str) -> str:
    """``text`` with each finding replaced by its kind in brackets."""
    parts, end = [], 0
    for one in find_personal_data(text):
        parts += [text[end : one.start], f"[{one.kind.upper()}]"]
        end = one.end
    return "".join([*parts, text[end:]])


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a message or in tool-call arguments, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _NO_PROSE:
                yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def texts_of_row(row: AnyRow) -> Iterator[str]:
    """Every text in a row; of a preference, what both answers share once."""
    if isinstance(row, TextRow):
        yield row.text
    elif isinstance(row, PreferenceRow):
        yield from texts_of(row.chosen.messages)
        yield from texts_of(row.rejected.messages[-1])
    else:
        yield from texts_of(row.messages)


def redacted(value: Any) -> Any:
    """The same message or arguments with every text redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: item if key in _NO_PROSE else redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item) for item in value]
    return value


_NO_PROSE = ("role", "id", "tool_call_id", "type")


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return digits[0] in _CARD_FIRST_DIGITS and bool(luhn.is_valid(digits))


def _is_phone(text: str) -> bool:
    try:
        return bool(phonenumbers.is_valid_number(phonenumbers.parse(text, HOME_REGION)))
    except phonenumbers.NumberParseException:
        return False


def _is_public_address(text: str) -> bool:
    try:
        return ip_address(text).is_global
    except ValueError:
        return False


def _is_iban(text: str) -> bool:
    return bool(iban.is_valid(text))


def _is_ssn(text: str) -> bool:
    return bool(ssn.is_valid(text))


def _is_email(_text: str) -> bool:
    return True


# Kind, pattern, a text without which the pattern cannot match (it spares most rows the search), and the judge.
_RULES: tuple[tuple[str, re.Pattern[str], str, Callable[[str], bool]], ...] = (
    ("email", _EMAIL, "@", _is_email),
    ("iban", _IBAN, "", _is_iban),
    ("card", _CARD, "", _is_card),
    ("ssn", _SSN, "-", _is_ssn),
    ("ip_address", _IPV4, ".", _is_public_address),
    ("ip_address", _IPV6, ":", _is_public_address),
    ("phone", _PHONE, "", _is_phone),
)
