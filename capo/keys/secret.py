"""What a key looks like: ``capo_<id>_<secret>``.

The id is public: it stands in lists, logs and metrics. The secret has 32 random bytes and is never stored, only its
SHA-256. A slow hash would add nothing, because there is nothing to guess among 256 random bits.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

_SECRET_BYTES = 32
_ID_BYTES = 6
_KEY = re.compile(r"capo_([0-9a-f]{12})_([A-Za-z0-9_-]{43,86})")


@dataclass(frozen=True, slots=True)
class Secret:
    """A key as its owner holds it. ``text`` is shown once."""

    key_id: str
    text: str

    def __repr__(self) -> str:
        return f"Secret(key_id={self.key_id!r})"  # so that no log line or traceback can hold the text

    @property
    def digest(self) -> str:
        return digest_of(self.text)


def new_secret(key_id: str | None = None) -> Secret:
    """A new key, or a new secret for the id of an old one."""
    key_id = key_id or secrets.token_hex(_ID_BYTES)
    return Secret(key_id, f"capo_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}")


def read_secret(text: str) -> Secret | None:
    """``text`` as a key; ``None`` if it cannot be one."""
    match = _KEY.fullmatch(text)
    return None if match is None else Secret(match[1], text)


def digest_of(text: str) -> str:
    """What is stored of a key: SHA-256 of the whole text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()
