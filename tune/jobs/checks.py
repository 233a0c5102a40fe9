"""Checks of a job request that need nothing but the request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from registry.errors import InvalidRequestError
from tune.jobs.records import JobMethod
from tune.jobs.requests import CreateJobBody, HyperparametersBody

MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512


def given_method(body: CreateJobBody) -> JobMethod:
    """After :func:`check_method`."""
    return "dpo" if body.method is not None and body.method.type == "dpo" else "supervised"


def given_hyperparameters(body: CreateJobBody) -> HyperparametersBody:
    """The hyper-parameters, wherever the client put them."""
    return _said(body.hyperparameters) or _inner_hyperparameters(body) or HyperparametersBody()


def _inner_hyperparameters(body: CreateJobBody) -> HyperparametersBody | None:
    part = None if body.method is None else body.method.dpo or body.method.supervised
    return None if part is None else _said(part.hyperparameters)


def _said(given: HyperparametersBody | None) -> HyperparametersBody | None:
    """An empty object asks for nothing."""
    return given if given is not None and given.model_fields_set else None


def check_method(body: CreateJobBody) -> None:
    method = body.method
    if method is None:
        return
    if method.type == "reinforcement":
        raise reinforcement_not_offered("method.type")
    for name in ("supervised", "dpo", "reinforcement"):
        if name != method.type and getattr(method, name) is not None:
            raise InvalidRequestError(
                f"method.{name} does not belong to method.type {method.type!r}", param=f"method.{name}"
            )
    if _inner_hyperparameters(body) is not None and _said(body.hyperparameters) is not None:
        raise InvalidRequestError(
            f"hyperparameters and method.{method.type}.hyperparameters are both given; "
            "keep the latter, the former is OpenAI's old place for it",
            param="hyperparameters",
        )


def reinforcement_not_offered(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        "method.type 'reinforcement' is not offered: Capo has no graders; 'supervised' and 'dpo' are offered",
        code="method_not_offered",
        param=param,
    )


def check_metadata(metadata: Mapping[str, str] | None) -> None:
    pairs = metadata or {}
    if len(pairs) > MAX_METADATA_PAIRS:
        raise InvalidRequestError(
            f"metadata has {len(pairs)} pairs; at most {MAX_METADATA_PAIRS} are allowed", param="metadata"
        )
    for key, value in pairs.items():
        if not 1 <= len(key) <= MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
            raise InvalidRequestError(
                f"metadata[{key[:80]!r}]: keys have 1 to {MAX_METADATA_KEY} characters and values up to "
                f"{MAX_METADATA_VALUE}, got {len(key)} and {len(value)}",
                param="metadata",
            )
        if "\0" in key + value:
            raise InvalidRequestError(f"metadata[{key[:80]!r}]: the character NUL is not allowed", param="metadata")


def collect(faults: list[InvalidRequestError], check: Callable[[], Any]) -> Any:
    """The check's result; ``None`` after its fault was added to ``faults``."""
    try:
        return check()
    except InvalidRequestError as error:
        faults.append(error)
        return None


def as_one(faults: list[InvalidRequestError]) -> InvalidRequestError:
    """One error for all faults; the first one decides code and field."""
    first = faults[0]
    text = "; ".join(fault.message for fault in faults)
    return InvalidRequestError(text, code=first.code, param=first.param)
