"""What every part of a recipe is: a frozen record in which an unknown key is an error."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Record(BaseModel):
    """Frozen; an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _suggest_the_nearest_key(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for key in given:
            if key in cls.model_fields:
                continue
            shown = str(key)[:80]
            near = get_close_matches(shown, cls.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown key {shown!r}; {hint}allowed: {', '.join(cls.model_fields)}")
        return given
