"""The stock SDK's own types, held against what the service really sent: field by field, and nothing coerced.

The SDK builds its objects without checking them, so a wrong one would only be noticed by whoever uses the field.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel


def assert_no_wrong_typed_field(value: BaseModel) -> None:
    """Strictly, as JSON: ``"3"`` is no integer and ``1`` no boolean. Fields that the SDK requires must be there."""
    sent = value.to_json() if hasattr(value, "to_json") else value.model_dump_json()
    type(value).model_validate_json(sent, strict=True)
    required = {name for name, field in type(value).model_fields.items() if field.is_required()}
    assert required <= value.model_fields_set, f"not sent: {required - value.model_fields_set}"


def assert_no_wrong_typed_fields(values: Iterable[BaseModel]) -> list[BaseModel]:
    found = list(values)
    for value in found:
        assert_no_wrong_typed_field(value)
    return found
