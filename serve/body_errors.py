"""What is wrong with a body, from what pydantic says of it: one fault, by its place in the client's own body.

Where a field may have several forms, pydantic tells what is wrong with each of them, in no order of likelihood: of a
message without content, that it is no string, no file search and no developer's message. What the client meant is the
form that fits best. Knows none of vLLM's classes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pydantic

from registry import errors

logger = logging.getLogger(__name__)

_DISCRIMINATORS = (("type",), ("role",))
"""By these fields OpenAI's objects say what they are."""

_MOST_FAULTS = 10_000
"""Told of. Pydantic can only write all of them at once, for 10 to 30 us each. The forms of one item of /v1/responses
make 250, and only the first item is told of; those of 128 tools make 3,300."""

_KINDS = {
    "string_type": "a text",
    "list_type": "a list",
    "iterable_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dataclass_type": "an object",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}
"""What pydantic's types of errors ask for (pydantic.dev/docs, "Validation Errors")."""


@dataclass(frozen=True, slots=True)
class _Form:
    """A step of a place that is no part of the body: one of the forms that a value may have."""

    label: str


_Step = str | int | _Form


@dataclass(frozen=True, slots=True)
class _Fault:
    """``steps`` lead to its place, from where it is looked at; ``value`` stands there."""

    steps: tuple[_Step, ...]
    kind: str
    message: str
    expected: tuple[str, ...]
    """What would be right, in words; several where each form asks for something else."""
    value: Any


def invalid_body(error: pydantic.ValidationError, body: Mapping[str, Any]) -> errors.InvalidRequestError:
    """``body``: what was validated."""
    if (number := error.error_count()) > _MOST_FAULTS:
        return errors.InvalidRequestError(
            f"The body is wrong in {number} ways, too many to tell of one. /openapi.json says what it may hold."
        )
    found = error.errors(include_url=False, include_input=False)
    fault = _likeliest([_fault(each, body) for each in found])[0]
    place = ".".join(str(step) for step in fault.steps)[:200]
    return errors.InvalidRequestError(_sentence(place or "The body", fault), param=place or None)


def formless(error: Exception) -> errors.InvalidRequestError:
    """For what came of looking into a body whose form had not been checked."""
    logger.warning("a body cannot be read", exc_info=error)
    return errors.InvalidRequestError("The body has a form that cannot be read.")


def _sentence(place: str, fault: _Fault) -> str:
    if fault.kind == "missing":
        return f"{place} is missing."
    if fault.expected:
        return f"{place} must be {' or '.join(dict.fromkeys(fault.expected))}, got {json.dumps(fault.value)[:100]}."
    return f"{place}: {fault.message}"


def _fault(told: Mapping[str, Any], body: Mapping[str, Any]) -> _Fault:
    kind, location = told["type"], told["loc"]
    steps: list[_Step] = []
    value: Any = body
    for number, part in enumerate(location, 1):
        is_missing = kind == "missing" and number == len(location)
        if is_missing or _has(value, part):
            steps.append(part)
            value = None if is_missing else value[part]
        else:
            steps.append(_Form(str(part)))
    expected = told["ctx"]["expected"] if kind == "literal_error" else _KINDS.get(kind)
    return _Fault(tuple(steps), kind, told["msg"], (expected,) if expected else (), value)


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _likeliest(faults: Sequence[_Fault]) -> list[_Fault]:
    """``faults`` of one value, without those of forms that it was not meant to have."""
    forms: dict[str, list[_Fault]] = {}
    fields: dict[str | int, list[_Fault]] = {}
    likeliest = [fault for fault in faults if not fault.steps]
    for fault in faults:
        if fault.steps:
            step, rest = fault.steps[0], replace(fault, steps=fault.steps[1:])
            if isinstance(step, _Form):
                forms.setdefault(step.label, []).append(rest)
            else:
                fields.setdefault(step, []).append(rest)
    if forms:
        likeliest += _best([_likeliest(form) for named in forms.items() for form in _apart(*named)])
    for step, below in fields.items():
        likeliest += [replace(fault, steps=(step, *fault.steps)) for fault in _likeliest(below)]
    return likeliest


def _apart(label: str, faults: list[_Fault]) -> list[list[_Fault]]:
    """Forms behind a function all have its name; each tells of its type first."""
    if not label.startswith("function-"):
        return [faults]
    apart: list[list[_Fault]] = [[]]
    for fault in faults:
        if fault.steps in _DISCRIMINATORS and apart[-1]:
            apart.append([])
        apart[-1].append(fault)
    return apart


def _best(forms: list[list[_Fault]]) -> list[_Fault]:
    """The faults of the form that fits best: by what the value says it is, then by how few and how far in they are."""
    fitting = [form for form in forms if not any(_is_of_the_form(fault) for fault in form)]
    if fitting:
        return min(fitting, key=lambda form: (len(form), -_entries_before(form[0])))
    of_forms = [fault for form in forms for fault in form if _is_of_the_form(fault)]
    # Where the value has the kind of some forms, it is not about those of other kinds.
    nearest = max(of_forms, key=lambda fault: len(fault.steps))
    alike = [fault for fault in of_forms if fault.steps == nearest.steps]
    return [replace(nearest, expected=tuple(word for fault in alike for word in fault.expected))]


def _is_of_the_form(fault: _Fault) -> bool:
    """Whether it says that the value has another form altogether."""
    return not fault.steps or (fault.steps in _DISCRIMINATORS and fault.kind == "literal_error")


def _entries_before(fault: _Fault) -> int:
    """Of a list, how many entries are right."""
    step = fault.steps[0]
    return step if isinstance(step, int) else 0
