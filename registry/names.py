"""Names, and the one parser for every text that says which model is meant.

    support                                   an alias: points to a revision, may be flipped
    support@3f9c0a7b21d4e865                  a revision: name and the first hex digits of its manifest's digest
    ft:capo-tiny:acme:support:a1B2c3          a fine-tuned name: write-once alias of one job's result
    ft:capo-tiny:acme::a1B2c3:ckpt-step-200   the same without a suffix, for a checkpoint

Names become path components, metric labels and engine keys. So each part is matched in full against a strict
ASCII pattern, and a text that does not match is refused: nothing is lower-cased, trimmed, decoded or
Unicode-normalised.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from registry.errors import InvalidNameError

NAME_RULE = "1 to 64 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit, without '..' or a final '.'"

# vLLM 0.32 gives these adapter names a meaning of their own: a chat request to the base model whose content
# parts have that type gets the adapter (vllm/entrypoints: _get_active_default_mm_loras). base and default are
# ours: on the wire they would read as "the base model".
RESERVED_NAMES = frozenset(
    {"text", "image", "audio", "video", "input", "prompt", "file", "base", "default"},
)

REVISION_DIGITS = 16
"""Hex digits of a digest that a revision shows."""
MIN_DIGEST_PREFIX = 8
DIGEST_DIGITS = 64

# Both bounds keep the encoded alias below the 255 bytes that Linux file systems allow for a file name.
_MAX_FINE_TUNED_NAME = 200
_MAX_ENCODED_ALIAS = 240

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_DIGEST_PREFIX = re.compile(r"[0-9a-f]{8,64}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_BASE_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_BASE_MODEL_ID = re.compile(rf"{_BASE_PART}(?:/{_BASE_PART}|@[0-9a-f]{{8,64}})?", re.ASCII)
_FINE_TUNED_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_CHECKPOINT = re.compile(r"ckpt-step-(0|[1-9][0-9]{0,8})", re.ASCII)
_UNENCODED = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")


@dataclass(frozen=True, slots=True)
class AliasName:
    name: str

    @property
    def text(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class RevisionReference:
    name: str
    digest_prefix: str
    """8 to 64 lower-case hex digits."""

    @property
    def text(self) -> str:
        return f"{self.name}@{self.digest_prefix}"


@dataclass(frozen=True, slots=True)
class FineTunedName:
    base: str
    organization: str
    suffix: str
    """May be empty, as in OpenAI's names."""
    id: str
    checkpoint_step: int | None = None

    @property
    def text(self) -> str:
        stem = f"ft:{self.base}:{self.organization}:{self.suffix}:{self.id}"
        return stem if self.checkpoint_step is None else f"{stem}:ckpt-step-{self.checkpoint_step}"


Reference = AliasName | RevisionReference | FineTunedName
MutableReference = AliasName | FineTunedName


def parse_reference(text: str) -> Reference:
    """What ``text`` refers to.

    Raises:
        InvalidNameError: it is neither a name, a revision nor a fine-tuned name; the message says what is allowed.
    """
    if text.startswith("ft:"):
        return _parse_fine_tuned_name(text)
    if "@" in text:
        return _parse_revision(text)
    return AliasName(check_name(text))


def parse_alias(text: str) -> MutableReference:
    """Like :func:`parse_reference`, for places where a revision makes no sense."""
    reference = parse_reference(text)
    if isinstance(reference, RevisionReference):
        raise InvalidNameError(
            f"{shown(text)} is a revision, which never changes. Give an alias: {NAME_RULE}; or an ft: name."
        )
    return reference


def check_name(text: str, *, reserved: Collection[str] = ()) -> str:
    """``text`` itself, if it may name an artifact or an alias; ``reserved`` adds names to the reserved ones.

    Raises:
        InvalidNameError: the text breaks the rule or is reserved.
    """
    if _NAME.fullmatch(text) is None or ".." in text or text.endswith("."):
        raise InvalidNameError(f"{shown(text)} is not a name. Allowed: {NAME_RULE}.")
    if text in RESERVED_NAMES or text in reserved:
        raise InvalidNameError(
            f"The name {shown(text)} is reserved, because the engine or the API gives it another meaning. "
            "Choose another name.",
            code="reserved_name",
        )
    return text


def check_digest(text: str) -> str:
    """``text`` itself, if it is a whole sha256 digest in lower-case hex.

    Raises:
        InvalidNameError: it is not.
    """
    if _DIGEST.fullmatch(text) is None:
        raise InvalidNameError(f"{shown(text)} is not a digest. Allowed: {DIGEST_DIGITS} of 0-9 and a-f.")
    return text


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def check_base_model_id(text: str) -> str:
    """``text`` itself, if it may identify a base model: ``name``, ``organization/name`` or ``name@revision``.

    Raises:
        InvalidNameError: it may not.
    """
    if _BASE_MODEL_ID.fullmatch(text) is None or ".." in text:
        raise InvalidNameError(
            f"{shown(text)} is not a base model id. Allowed: name, organization/name or name@revision, each "
            "part of 1 to 96 of A-Z, a-z, 0-9, '.', '_' and '-', without '..'."
        )
    return text


def alias_file_stem(alias: MutableReference) -> str:
    """File name for an alias: every character but a-z, 0-9, '.', '_' and '-' as ``%`` and two hex digits.

    Capitals are encoded too, so that two aliases never meet on a file system that ignores case.
    """
    stem = "".join(c if c in _UNENCODED else f"%{ord(c):02x}" for c in alias.text)
    if len(stem) > _MAX_ENCODED_ALIAS:
        raise InvalidNameError(
            f"{shown(alias.text)} is too long to store: {len(stem)} bytes with capitals and ':' encoded, "
            f"at most {_MAX_ENCODED_ALIAS} are allowed. Use a shorter suffix or a base model id with fewer capitals."
        )
    return stem


def shown(text: str) -> str:
    """``text`` for a message: quoted, ASCII only, at most about 80 characters."""
    return ascii(text) if len(text) <= 80 else f"{text[:60]!a}... ({len(text)} characters)"


def _parse_revision(text: str) -> RevisionReference:
    name, _, prefix = text.partition("@")
    if _DIGEST_PREFIX.fullmatch(prefix) is None:
        raise InvalidNameError(
            f"{shown(text)} is not a revision. Allowed: <name>@ and the first {MIN_DIGEST_PREFIX} to "
            f"{DIGEST_DIGITS} hex digits (0-9, a-f) of the digest."
        )
    return RevisionReference(check_name(name), prefix)


def _parse_fine_tuned_name(text: str) -> FineTunedName:
    parts = text.split(":")
    if len(text) > _MAX_FINE_TUNED_NAME or len(parts) not in (5, 6):
        raise _not_fine_tuned(text)
    base, organization, suffix, job_id = parts[1:5]
    checkpoint = _CHECKPOINT.fullmatch(parts[5]) if len(parts) == 6 else None
    if (len(parts) == 6 and checkpoint is None) or _FINE_TUNED_ID.fullmatch(job_id) is None:
        raise _not_fine_tuned(text)
    try:
        check_base_model_id(base)
        for part in (organization, suffix) if suffix else (organization,):
            if _NAME.fullmatch(part) is None or ".." in part:
                raise _not_fine_tuned(text)
    except InvalidNameError as error:
        raise _not_fine_tuned(text) from error
    step = None if checkpoint is None else int(checkpoint.group(1))
    return FineTunedName(base, organization, suffix, job_id, step)


def _not_fine_tuned(text: str) -> InvalidNameError:
    return InvalidNameError(
        f"{shown(text)} is not a fine-tuned name. Allowed: ft:<base>:<organization>:<suffix>:<id>, with an "
        "empty suffix if there is none, and :ckpt-step-<number> at the end for a checkpoint; at most "
        f"{_MAX_FINE_TUNED_NAME} characters; organization and suffix are 1 to 64 of a-z, 0-9, '.', '_' and '-'."
    )
