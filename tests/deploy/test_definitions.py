"""Our custom resources against types that others generated from the definitions themselves.

The npm packages of kubernetes-models come from the Prometheus operator's Go types and from KEDA's release manifest;
TypeScript refuses a literal with a field that its type lacks. So :mod:`tests.deploy.validation` has a second opinion.
For KubeRay there is no such package; tests/deploy/schemas/README.md says what that schema was compared with.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.render import Object, render
from tests.programs import program

PACKAGES = (
    "@kubernetes-models/prometheus-operator@6.0.0",
    "@kubernetes-models/keda@2.0.0",
    "typescript@5.9.3",
)
MODULES = {
    "ServiceMonitor": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor",
    "PrometheusRule": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule",
    "ScaledObject": "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject",
}
WRONG: list[tuple[str, str, Any]] = [
    ("ServiceMonitor", "spec.endpoints.0.targetport", "http"),
    ("ServiceMonitor", "spec.sampleLimit", "many"),
    ("PrometheusRule", "spec.groups.0.rules.0.expression", "up"),
    ("ScaledObject", "spec.minReplicas", 2),
    ("ScaledObject", "spec.triggers.0.metadata.threshold", 4),
    ("ScaledObject", "spec.advanced.horizontalPodAutoscalerConfig.behavior.scaledown", {}),
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages in it."""
    folder = tmp_path_factory.mktemp("definitions")
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    run(folder, program("npm"), "install", "--no-audit", "--no-fund", "--ignore-scripts", "--save-exact", *PACKAGES)
    return folder


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def faults(workshop: Path, items: list[Object]) -> dict[int, str]:
    """What TypeScript says of each object, by its place in the list, and the validator of its package."""
    kinds = sorted({item["kind"] for item in items})
    names = {kind: f'import {{ {kind}, type I{kind} }} from "{MODULES[kind]}";' for kind in kinds}
    checks = [
        f"const object{number}: I{item['kind']} = {json.dumps(item)};\n"
        f"values.push(() => new {item['kind']}(object{number}).validate());"
        for number, item in enumerate(items)
    ]
    tried = "v => { try { v(); return null } catch (e) { return String(e) } }"
    report = f"console.log(JSON.stringify(values.map({tried})));"
    lines = [*names.values(), "const values: (() => void)[] = [];", *"\n".join(checks).splitlines(), report]
    (workshop / "check.ts").write_text("\n".join(lines))
    compiler = [program("node"), "node_modules/typescript/bin/tsc", "check.ts", "--strict", "--skipLibCheck"]
    compiler += ["--module", "nodenext", "--target", "es2022"]
    told = subprocess.run(compiler, cwd=workshop, capture_output=True, text=True, timeout=300, check=False).stdout
    found: dict[int, str] = {}
    for line in told.splitlines():
        at = re.match(r"check\.ts\((\d+),", line)
        if at is not None:
            named = re.match(r"const object(\d+):", lines[int(at[1]) - 1])
            assert named is not None, told
            found[int(named[1])] = line
        else:
            assert line.startswith(" "), told
    refused = json.loads(run(workshop, program("node"), "check.js"))
    return {number: text for number, text in enumerate(refused) if text is not None} | found


def test_our_custom_resources_have_the_types_of_their_definitions(workshop: Path) -> None:
    items = [item for item in render("replicas").objects if item["kind"] in MODULES]
    assert {item["kind"] for item in items} == set(MODULES)
    damaged = []
    for kind, path, wrong in WRONG:
        place = item = copy.deepcopy(next(item for item in items if item["kind"] == kind))
        *parents, last = path.split(".")
        for name in parents:
            place = place[int(name)] if name.isdigit() else place[name]
        place[last] = wrong
        damaged.append(item)
    found = faults(workshop, [*items, *damaged])
    assert {number: text for number, text in found.items() if number < len(items)} == {}
    assert sorted(found) == list(range(len(items), len(items) + len(WRONG))), "each planted fault, and no other"
