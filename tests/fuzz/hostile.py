"""Sound bodies made unsound: wrong types, huge numbers, deep nesting, repeated keys, broken text."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, -(2**31), 2**63, -(2**63) - 1, 10**30, 10**400, 0.0, -0.0, 1e-320, 1e308,
    "", " ", "\x00", "a" * 10_000, "\u202e", "\U0001f600" * 50, "../../etc/passwd", "{{ 7 * 7 }}", "<|im_end|>",
    "capo-tiny", "NaN", "1", [], {}, [[]], [None], {"": ""}, [1, "a", None], [[[[[1]]]]], {"type": "object"},
    [0] * 3000, ["x"] * 200, {str(n): n for n in range(400)},
)  # fmt: skip
_TEXTS: tuple[bytes, ...] = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"01", b"1.", b"0x10", b"'a'", b'"\\ud800"',
    b'"\\udc00\\ud800"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\\x"', b'"\n"', b"[" * 60, b"{" * 60,
    b"[" * 5000 + b"]" * 5000,
    b'{"a":' * 2000 + b"1" + b"}" * 2000, b"undefined", b"", b"//", b"9" * 5000, b"9" * 400, b"-" + b"9" * 25,
)  # fmt: skip
_KEYS = ("", "model", "messages", "n", "\x00", "__proto__", "priority", "stream", "x" * 500, "prompt_embeds", "ünïcode")


def hostile_body(of: random.Random, sound: list[dict[str, Any]]) -> bytes:
    """One body; the same ``of`` gives the same one."""
    body = copy.deepcopy(of.choice(sound))
    for _ in range(of.choice((1, 1, 1, 2, 4))):
        _change_a_value(of, body)
    raw = json.dumps(body, ensure_ascii=of.random() < 0.5).encode("utf-8", "surrogatepass")
    return of.choice(_RAW_CHANGES)(of, raw) if of.random() < 0.4 else raw


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Each (container, key) within ``node``."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in ((node, key), *_places(node[key]))]


def _change_a_value(of: random.Random, body: dict[str, Any]) -> None:
    places = _places(body)
    if not places:
        return
    container, key = of.choice(places)
    match of.randrange(6):
        case 0 | 1 | 2:
            container[key] = copy.deepcopy(of.choice(_VALUES))
        case 3 if isinstance(container, dict):
            container[of.choice(_KEYS)] = copy.deepcopy(of.choice(_VALUES))
        case 4:
            del container[key]
        case _:
            nested: Any = container[key]
            for _ in range(of.choice((1, 3, 40, 120))):
                nested = [nested] if of.random() < 0.5 else {"a": nested}
            container[key] = nested


def _with_a_text(of: random.Random, raw: bytes) -> bytes:
    """A value's text replaced by one that may be no JSON."""
    starts = [place for place, byte in enumerate(raw) if byte == ord(":")]
    if not starts:
        return of.choice(_TEXTS)
    start = of.choice(starts) + 1
    ends = [place for place in range(start, len(raw)) if raw[place] in b",}"]
    end = ends[0] if ends else len(raw)
    return raw[:start] + of.choice(_TEXTS) + raw[end:]


def _cut(of: random.Random, raw: bytes) -> bytes:
    return raw[: of.randrange(len(raw))] if raw else raw


def _repeated(of: random.Random, raw: bytes) -> bytes:
    return raw[:-1] + b"," + raw[1:] if raw.startswith(b"{") else raw + raw


def _flipped(of: random.Random, raw: bytes) -> bytes:
    data = bytearray(raw)
    for _ in range(of.choice((1, 2, 8))):
        if data:
            data[of.randrange(len(data))] = of.randrange(256)
    return bytes(data)


def _padded(of: random.Random, raw: bytes) -> bytes:
    return of.choice((b"\xef\xbb\xbf", b"\x00", b" " * 10_000, b"[", b"\xff")) + raw


_RAW_CHANGES = (_with_a_text, _with_a_text, _cut, _repeated, _flipped, _padded)
