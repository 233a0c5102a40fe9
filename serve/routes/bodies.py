"""Request bodies of the admin routes: JSON objects with known fields only."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from registry import errors


class Body(BaseModel):
    """A field that is unknown, missing or of another JSON type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class NoFields(Body):
    """For routes that take nothing."""


SomeBody = TypeVar("SomeBody", bound=Body)


def read_body(kind: type[SomeBody], raw: bytes) -> SomeBody:
    """The body as ``kind``.

    Raises:
        InvalidRequestError: it is not valid JSON, or not this; ``param`` is the field at fault.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        raise errors.InvalidRequestError(f"The body is not valid JSON: {first['msg']}.", code="invalid_json")
    param = ".".join(str(part) for part in first["loc"])
    allowed = ", ".join(kind.model_fields) or "none"
    raise errors.InvalidRequestError(
        f"{param or 'The body'}: {first['msg']}. Send one JSON object; its fields are: {allowed}.", param=param or None
    )


def read_no_body(raw: bytes) -> None:
    """Refuse whatever a client sends to a route that takes nothing.

    Raises:
        InvalidRequestError: there is something.
    """
    if raw:
        read_body(NoFields, raw)
