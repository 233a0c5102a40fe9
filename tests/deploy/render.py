"""What `kubectl kustomize` makes of an overlay, with the questions that the rules ask of it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.programs import program

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
CONTAINER = ROOT / "deploy/container"
OVERLAYS = ("cpu-demo", "gpu", "postgresql", "ray", "replicas", "replicas-hpa")

Object = dict[str, Any]


@cache
def rendered_text(folder: Path) -> str:
    done = subprocess.run([program("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(overlay: str, *components: str) -> Render:
    """A fresh copy each time, so that a test may damage it. ``components`` are put into the overlay beside its own."""
    text = _rendered_with(overlay, components) if components else rendered_text(KUBERNETES / "overlays" / overlay)
    return Render(list(yaml.load_all(text, _Loader)))


@cache
def _rendered_with(overlay: str, components: tuple[str, ...]) -> str:
    """As after `kustomize edit add component`."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "deploy", Path(folder) / "deploy")
        path = Path(folder) / "deploy/kubernetes/overlays" / overlay / "kustomization.yaml"
        described = yaml.safe_load(path.read_text())
        described["components"] += [f"../../components/{name}" for name in components]
        path.write_text(yaml.safe_dump(described))
        return rendered_text(path.parent)


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Pod:
    """A pod template, wherever it stands: of a workload or inside a custom resource."""

    name: str
    kind: str
    labels: dict[str, str]
    spec: Object
    workload: Object

    @property
    def component(self) -> str:
        return self.labels.get("app.kubernetes.io/component", "")

    @property
    def container(self) -> Object:
        containers: list[Object] = self.spec["containers"]
        return containers[0]

    def environment(self, name: str) -> str | None:
        return next((e.get("value") for e in self.container.get("env", []) if e["name"] == name), None)

    def volume(self, name: str) -> Object:
        return next(v for v in self.spec["volumes"] if v["name"] == name)

    def mounts(self) -> dict[str, Object]:
        return {mount["mountPath"]: mount for mount in self.container.get("volumeMounts", [])}


class Render:
    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects

    def of(self, kind: str) -> list[Object]:
        return [o for o in self.objects if o["kind"] == kind]

    def get(self, kind: str, name: str) -> Object:
        return next(o for o in self.of(kind) if o["metadata"]["name"].startswith(name))

    def has(self, kind: str, name: str) -> bool:
        return any(o["metadata"]["name"].startswith(name) for o in self.of(kind))

    def pods(self) -> Iterator[Pod]:
        for item in self.objects:
            if item["kind"] in ("Deployment", "StatefulSet", "Job"):
                template = item["spec"]["template"]
                yield _pod(item["metadata"]["name"], item, template)
            elif item["kind"] == "RayCluster":
                yield _pod("ray head", item, item["spec"]["headGroupSpec"]["template"])
                for group in item["spec"]["workerGroupSpecs"]:
                    yield _pod(f"ray {group['groupName']}", item, group["template"])

    def pod(self, name: str) -> Pod:
        return next(pod for pod in self.pods() if pod.name == name)

    def capo_pods(self) -> list[Pod]:
        return [pod for pod in self.pods() if pod.component != "postgresql"]

    def settings(self, pod: Pod) -> dict[str, str]:
        """The environment of a pod, from its ConfigMaps and its own list."""
        found: dict[str, str] = {}
        for source in pod.container.get("envFrom", []):
            name = source["configMapRef"]["name"]
            found |= next(o["data"] for o in self.of("ConfigMap") if o["metadata"]["name"] == name)
        return found | {e["name"]: e.get("value", "") for e in pod.container.get("env", [])}


def _pod(name: str, workload: Object, template: Object) -> Pod:
    return Pod(name, workload["kind"], template["metadata"].get("labels", {}), template["spec"], workload)


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a Kubernetes label selector matches; an empty one matches everything."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for expression in selector.get("matchExpressions") or []:
        value, wanted = labels.get(expression["key"]), expression.get("values", [])
        holds = {
            "In": value in wanted,
            "NotIn": value not in wanted,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[expression["operator"]]
        if not holds:
            return False
    return True


def gibibytes(quantity: str) -> float:
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    for suffix, factor in units.items():
        if quantity.endswith(suffix):
            return float(quantity.removesuffix(suffix)) * factor / 2**30
    return float(quantity) / 2**30
