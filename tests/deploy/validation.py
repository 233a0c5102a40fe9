"""Strict validation of rendered objects: Kubernetes' own kinds for one of its versions, custom ones by our schemas."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate import utils

from tests.deploy.render import Object

VERSIONS = ("1.33", "1.35", "1.37")
# It parses a megabyte of JSON for each object otherwise.
utils.schema_contents = cache(utils.schema_contents)


@cache
def custom_schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "schemas/custom.yaml").read_text())
    return schemas


def problems(item: Object, version: str) -> Iterator[str]:
    schemas = custom_schemas()
    if item["kind"] in schemas:
        schema = {"$defs": schemas["$defs"], **schemas[item["kind"]]}
        yield from (e.message for e in jsonschema.Draft202012Validator(schema).iter_errors(item))
        for stand_in in native_parts(item):
            yield from problems(stand_in, version)
        return
    try:
        kubernetes_validate.validate(item, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield error.message


def native_parts(item: Object) -> Iterator[Object]:
    """What a custom resource holds of Kubernetes' own kinds, as objects of those kinds."""
    metadata = {"name": "part"}
    spec = item["spec"]
    if item["kind"] == "RayCluster":
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            yield {"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata, "template": group["template"]}
    if item["kind"] == "ScaledObject":
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        target = spec["scaleTargetRef"]
        yield {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": metadata,
            "spec": {"scaleTargetRef": target, "maxReplicas": spec["maxReplicaCount"], "behavior": behavior},
        }
