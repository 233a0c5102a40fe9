"""From protobuf requests to the HTTP bodies, which one place checks for both faces."""

from __future__ import annotations

import json
import math
from typing import Any

from capo_proto.v1 import tuning_pb2 as pb
from registry.errors import InvalidRequestError
from registry.strict_json import parse_strict_json
from tune.jobs.idempotency import Idempotency
from tune.jobs.requests import CreateJobBody, parse_body

_METHODS = {
    pb.JOB_METHOD_UNSPECIFIED: "supervised",
    pb.JOB_METHOD_SUPERVISED: "supervised",
    pb.JOB_METHOD_DPO: "dpo",
}
_SAME_NAME = ("validation_file", "suffix", "seed")


def create_job_body(request: pb.CreateJobRequest) -> tuple[CreateJobBody, Idempotency | None]:
    """The request as the body of ``POST /v1/fine_tuning/jobs``, checked as that is.

    Raises:
        InvalidRequestError: as for the HTTP body, and for an enum's value that is none of its own.
    """
    body: dict[str, Any] = {"model": request.model, "training_file": request.training_file}
    body |= {name: getattr(request, name) for name in _SAME_NAME if request.HasField(name)}
    if request.metadata:
        body["metadata"] = dict(request.metadata)
    if request.method or request.HasField("hyperparameters"):
        body["method"] = _method(request)
    if request.integrations:
        body["integrations"] = [_integration(integration) for integration in request.integrations]
    if request.HasField("capo"):
        body["capo"] = _capo_object(request.capo)
    raw = json.dumps(body, sort_keys=True).encode()
    asked = Idempotency.of(request.idempotency_key, raw) if request.HasField("idempotency_key") else None
    return parse_body(raw, CreateJobBody), asked


def _method(request: pb.CreateJobRequest) -> dict[str, Any]:
    if request.method not in _METHODS:
        raise InvalidRequestError(
            f"method is {request.method}; allowed are 0 (not set), 1 (supervised) and 2 (dpo)", param="method"
        )
    name = _METHODS[request.method]
    given = {field.name: value for field, value in request.hyperparameters.ListFields()}
    for field, value in given.items():
        if not math.isfinite(value):
            raise InvalidRequestError(
                f"hyperparameters.{field} is {value}; send a finite number", param=f"hyperparameters.{field}"
            )
    return {"type": name, name: {"hyperparameters": given}}


def _integration(integration: pb.Integration) -> dict[str, Any]:
    if not integration.HasField("wandb"):
        raise InvalidRequestError("an integration names no service; set wandb", param="integrations")
    wandb = integration.wandb
    given = {name: getattr(wandb, name) for name in ("name", "entity") if wandb.HasField(name)}
    if wandb.tags:
        given["tags"] = list(wandb.tags)
    return {"type": "wandb", "wandb": {"project": wandb.project, **given}}


def _capo_object(text: str) -> Any:
    try:
        return parse_strict_json(text.encode())
    except ValueError as error:
        raise InvalidRequestError(f"capo is not valid JSON: {error}", code="invalid_json", param="capo") from error
