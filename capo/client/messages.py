"""Making protobuf messages of what a caller gave, with our own error where a value cannot stand in its field."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from capo.client.errors import InvalidRequestError

Kind = TypeVar("Kind", bound=Message)


def made(kind: type[Kind], **fields: Any) -> Kind:
    """``kind`` with these fields; ``None`` is not set.

    Raises:
        InvalidRequestError: a value is of the wrong type, beyond its field's range, or no Unicode text.
    """
    try:
        message: Kind = kind(**fields)
    except (TypeError, ValueError) as error:
        param = next((name for name, value in fields.items() if not _fits(kind, name, value)), None)
        shown = "" if param is None else f"{param} is {_shown(fields[param])}: "
        raise refused(f"{shown}{error}", param) from error
    return message


def as_json(name: str, value: Any) -> str:
    """``value`` as text, for a field that holds JSON.

    Raises:
        InvalidRequestError: it is no JSON.
    """
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise refused(f"{name} cannot be written as JSON: {error}", name) from error


def refused(message: str, param: str | None) -> InvalidRequestError:
    """As the server would refuse it."""
    return InvalidRequestError(message, status=grpc.StatusCode.INVALID_ARGUMENT, code="invalid_argument", param=param)


def _fits(kind: type[Message], name: str, value: Any) -> bool:
    try:
        kind(**{name: value})
    except (TypeError, ValueError):
        return False
    return True


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:60]}..."
