"""Every PromQL expression of deploy/: panels, rules, alerts without their thresholds, autoscalers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from tests.deploy.render import ROOT, render

PROMETHEUS = ROOT / "deploy/prometheus"
DASHBOARDS = ROOT / "deploy/grafana/dashboards"
NAMESPACE = "capo"

_NAME = re.compile(r"\b((?:capo|vllm|process|scrape|up)(?:[_:][a-z0-9_:]+)?)\b\s*(\{[^}]*\})?")
_THRESHOLD = re.compile(r"\s(?:>=|<=|==|>|<)\s*[0-9.]+")


@dataclass(frozen=True)
class Expression:
    where: str
    text: str

    @property
    def metrics(self) -> list[tuple[str, dict[str, str]]]:
        """Names with the labels that they are asked for."""
        return [(name, dict(re.findall(r'(\w+)\s*=~?"([^"]*)"', labels))) for name, labels in _NAME.findall(self.text)]


def expressions() -> list[Expression]:
    return [*_panels(), *_rules(), *_autoscalers()]


def _panels() -> Iterator[Expression]:
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                text = target["expr"].replace("$namespace", NAMESPACE).replace("$__rate_interval", "1m")
                yield Expression(f"{path.stem}: {panel['title']}", text)


def _rules() -> Iterator[Expression]:
    for name in ("slo.yaml", "recording.yaml", "alerts.yaml"):
        for group in yaml.safe_load((PROMETHEUS / name).read_text())["groups"]:
            for rule in group["rules"]:
                yield Expression(rule.get("alert") or rule["record"], without_threshold(rule["expr"]))


def _autoscalers() -> Iterator[Expression]:
    for trigger in render("replicas").get("ScaledObject", "capo")["spec"]["triggers"]:
        yield Expression(f"KEDA: {trigger['name']}", trigger["metadata"]["query"])
    rules = yaml.safe_load(render("replicas-hpa").get("ConfigMap", "capo-adapter-rules")["data"]["config.yaml"])
    for rule in rules["externalRules"]:
        query = rule["metricsQuery"].replace("<<.LabelMatchers>>", f'namespace="{NAMESPACE}"')
        yield Expression(f"HPA: {rule['name']['as']}", query)


def without_threshold(text: str) -> str:
    """An alert's expression with a value also while all is well."""
    return _THRESHOLD.sub("", re.sub(r"absent\((\w+)\)", r"\1", text))
