"""What a client may send to create a job: OpenAI's body plus one extension object, ``capo``.

Bodies are parsed here and not by FastAPI, so that a mistake is answered in OpenAI's error shape, with the
field in ``param``, and so that nothing is coerced: ``"3"`` is not a number. A field that is not known is
refused with the nearest one that is.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from registry.errors import InvalidRequestError
from registry.strict_json import parse_strict_json
from tune.jobs.limits import MAX_GPUS
from tune.methods import LoraMethod

MAX_BODY_BYTES = 1024 * 1024
_REPORTED = 5

Model = TypeVar("Model", bound="Body")


class Body(BaseModel):
    """Base of all request bodies: frozen, strict, and honest about keys it does not know."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_fields(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                near = get_close_matches(key, cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? " if near else ""
                text = f"unknown field; {hint}allowed: {', '.join(cls.model_fields)}"
                raise PydanticCustomError("unknown_field", "{text}", {"text": text, "key": key})
        return given


def _auto_or(kind: Literal["integer", "number"], low: float, high: float) -> BeforeValidator:
    """``"auto"`` or a number from ``low`` to ``high``, said in one sentence, not one per union member."""

    def check(value: Any) -> Any:
        types = (int,) if kind == "integer" else (int, float)
        if value == "auto" or (type(value) in types and low <= value <= high):
            return value
        text = f'must be "auto" or {"an" if kind == "integer" else "a"} {kind} from {low:g} to {high:g}'
        raise PydanticCustomError("auto_or_number", "{text}", {"text": text})

    return BeforeValidator(check)


class HyperparametersBody(Body):
    """Ranges of the first two are OpenAI's (openapi spec of POST /fine_tuning/jobs)."""

    n_epochs: Annotated[Literal["auto"] | int, _auto_or("integer", 1, 50)] = "auto"
    batch_size: Annotated[Literal["auto"] | int, _auto_or("integer", 1, 256)] = "auto"
    learning_rate_multiplier: Annotated[Literal["auto"] | float, _auto_or("number", 0.001, 100)] = "auto"


class SupervisedBody(Body):
    hyperparameters: HyperparametersBody | None = None


class DpoHyperparametersBody(HyperparametersBody):
    beta: Annotated[Literal["auto"] | float, _auto_or("number", 0.001, 10)] = "auto"


class DpoBody(Body):
    hyperparameters: DpoHyperparametersBody | None = None


class MethodBody(Body):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedBody | None = None
    dpo: DpoBody | None = None
    reinforcement: dict[str, Any] | None = None


def _lists_as_tuples(value: Any) -> Any:
    """JSON has no tuples, and strict validation of a decoded body takes no list for one."""
    if not isinstance(value, dict):
        return value
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}


class CapoBody(Body):
    """What OpenAI's body cannot say; the SDK sends it with ``extra_body={"capo": {...}}``.

    The fields are those of :class:`tune.recipe.Recipe` and its stage, and mean the same.
    """

    lora: Annotated[LoraMethod, BeforeValidator(_lists_as_tuples)] | None = None
    method: dict[str, Any] | None = None
    """A recipe's ``method``: any that publishes an adapter. Instead of ``lora``."""
    stage: dict[str, Any] | None = None
    """Keys of a recipe's stage, except those that OpenAI's fields decide."""
    stages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=16)] | None = None
    """A recipe's stages in order; paths are ids of uploaded files. One has no ``data``: it is the request's own stage,
    and may hold what ``stage`` may. Instead of ``stage``."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    save_dtype: Literal["auto", "float32", "bfloat16"] | None = None
    evaluation: dict[str, Any] | None = None
    """A recipe's ``evaluation``, on the held-out rows: a client names no paths of the server."""
    promote_if: str | None = None
    exports: list[dict[str, Any]] | None = None
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Between checkpoints that a killed job resumes from."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Of waiting jobs the highest goes first."""
    gpus: Annotated[int, Field(ge=0, le=MAX_GPUS)] = 0
    """The job waits for a worker that offers as many, and trains in a process for each; 0 = any worker takes it."""
    alias: str | None = None
    """Name that points to the result as soon as it is published."""
    validation_share: Annotated[float, Field(ge=0.0, le=0.5)] | None = None
    """Share of the training rows to hold out; 0 = train on all of them. Not beside a validation file."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    over_length: Literal["truncate", "drop", "refuse"] | None = None
    evaluate_every_steps: Annotated[int, Field(ge=1)] | None = None


class WandbBody(Body):
    project: Annotated[str, Field(min_length=1, max_length=128)]
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    entity: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    tags: Annotated[list[str], Field(max_length=16)] | None = None


class IntegrationBody(Body):
    type: Literal["wandb"]
    wandb: WandbBody


class CreateJobBody(Body):
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    metadata: dict[str, str] | None = None
    hyperparameters: HyperparametersBody | None = None
    method: MethodBody | None = None
    integrations: list[IntegrationBody] | None = None
    capo: CapoBody | None = None


def parse_body(raw: bytes, model: type[Model]) -> Model:
    """Decode and check a JSON body.

    Raises:
        InvalidRequestError: with the first field at fault in ``param``; the message lists up to five.
    """
    try:
        return model.model_validate(_decode(raw), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)
        faults = [_fault(detail) for detail in details]
        text = "; ".join(dict.fromkeys(f"{path}: {reason}" if path else reason for path, reason in faults[:_REPORTED]))
        param = faults[0][0] or None
        code = "unknown_field" if details[0]["type"] == "unknown_field" else "invalid_request"
        raise InvalidRequestError(text, code=code, param=param) from error


def _fault(detail: Any) -> tuple[str, str]:
    location = [part for part in detail["loc"] if isinstance(part, int) or part.isidentifier()]
    reason = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "unknown_field":
        location.append(detail["ctx"]["key"])
    elif detail["type"] != "missing" and not isinstance(detail["input"], (dict, list)):
        reason = f"{reason}, got {_shortened(detail['input'])}"
    return ".".join(str(part) for part in location), reason


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _decode(raw: bytes) -> object:
    try:
        value = parse_strict_json(raw)
        if b"\\u" in raw:  # only an escape can smuggle in half a surrogate pair, which no store can keep
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    return value
