"""What deploy/kubernetes renders to: valid for three versions of Kubernetes, and safe by a hundred rules.

Not to be shown without a cluster: that a network plugin enforces the policies, that a storage class shares volumes,
what admission does, GPUs.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

from scripts.prometheus_rule import TARGET, resource
from tests.deploy import rules_around, rules_life, rules_network, rules_pods  # noqa: F401 - each adds its rules
from tests.deploy.defects import DEFECTS, Defect
from tests.deploy.render import KUBERNETES, OVERLAYS, ROOT, Render, render, rendered_text
from tests.deploy.rules import RULES
from tests.deploy.validation import VERSIONS, problems


def test_every_overlay_is_rendered_and_tested() -> None:
    assert sorted(path.name for path in (KUBERNETES / "overlays").iterdir()) == sorted(OVERLAYS)


@pytest.mark.parametrize("components", [(), ("tracing",)], ids=" ".join)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_rule_holds(overlay: str, components: tuple[str, ...]) -> None:
    rendered = render(overlay, *components)
    broken = {check.__name__: found for check in RULES if (found := list(check(rendered)))}
    assert broken == {}


def test_there_are_rules_enough_and_each_has_a_name_of_its_own() -> None:
    assert len({check.__name__ for check in RULES}) == len(RULES) >= 99


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_strictly(version: str) -> None:
    objects = [item for overlay in OVERLAYS for item in render(overlay).objects]
    objects += render("replicas", "tracing").objects
    objects += yaml.safe_load_all(rendered_text(KUBERNETES / "first-key"))
    different = {json.dumps(item, sort_keys=True): item for item in objects}
    wrong = {
        f"{item['kind']} {item['metadata']['name']}": found
        for item in different.values()
        if (found := list(problems(item, version)))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("Deployment", "spec.template.spec.containers.0.livenessprobe", {}),
        ("Deployment", "spec.template.spec.terminationGracePeriodSeconds", "270"),
        ("NetworkPolicy", "spec.podselector", {}),
        ("ServiceMonitor", "spec.endpoints.0.targetport", "http"),
        ("ServiceMonitor", "spec.endpoints.0.interval", "15"),
        ("PrometheusRule", "spec.groups.0.rules.0.expression", "up"),
        ("ScaledObject", "spec.triggers.0.metadata.threshold", 4),
        ("ScaledObject", "spec.minReplicas", 2),
        ("ScaledObject", "spec.advanced.horizontalPodAutoscalerConfig.behavior.scaledown", {}),
        ("RayCluster", "spec.headGroupSpec.template.spec.containers.0.livenessprobe", {}),
        ("RayCluster", "spec.workerGroupSpecs.0.min", 0),
    ],
)
def test_a_mistyped_field_is_found(kind: str, path: str, wrong: object) -> None:
    item = copy.deepcopy(render("ray" if kind == "RayCluster" else "replicas").of(kind)[0])
    assert list(problems(item, VERSIONS[-1])) == []
    place = item
    *parents, last = path.split(".")
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    place[last] = wrong
    assert list(problems(item, VERSIONS[-1])) != []


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_seeded_defect_is_caught_by_its_rule(defect: Defect) -> None:
    damaged: Render = render(defect.overlay, *defect.components)
    defect.damage(damaged)
    (check,) = [check for check in RULES if check.__name__ == defect.rule]
    assert list(check(damaged)) != []


def test_every_component_is_in_an_overlay_or_tested_beside_one() -> None:
    named = "".join(path.read_text() for path in (KUBERNETES / "overlays").glob("*/kustomization.yaml"))
    alone = {path.name for path in (KUBERNETES / "components").iterdir() if f"components/{path.name}" not in named}
    assert alone == {"tracing"}


def test_there_are_defects_enough() -> None:
    assert len(DEFECTS) >= 40


def test_the_first_key_goes_to_the_data_volume_and_not_into_a_log() -> None:
    (job,) = Render(list(yaml.safe_load_all(rendered_text(KUBERNETES / "first-key")))).pods()
    arguments = job.container["args"]
    place = Path(arguments[arguments.index("--output") + 1])
    mount = job.mounts()[str(place.parent)]
    control = render("replicas").pod("capo-control")
    for pod in (job, control):
        assert pod.volume(mount["name"])["persistentVolumeClaim"]["claimName"] == "capo-data"
    users = {pod.spec["securityContext"]["runAsUser"] for pod in (job, control)}
    assert len(users) == 1, "who fetches the key from a file for its owner alone"


def test_the_operators_rules_are_those_of_prometheus() -> None:
    assert yaml.safe_load(TARGET.read_text()) == resource(), "run `python scripts/prometheus_rule.py`"


def test_the_dashboards_in_the_cluster_are_grafanas_files() -> None:
    boards = [o for o in render("replicas").of("ConfigMap") if "dashboard" in o["metadata"]["name"]]
    shown = {name: text for board in boards for name, text in board["data"].items()}
    assert shown == {path.name: path.read_text() for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}
