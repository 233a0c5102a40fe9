"""Write the rules of deploy/prometheus as the Prometheus operator's resource; kustomize cannot put a file into a field.

python scripts/prometheus_rule.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
SOURCES = ("slo.yaml", "recording.yaml", "alerts.yaml")
TARGET = DEPLOY / "kubernetes/components/monitoring/rules.yaml"
_HEADER = "# Written by scripts/prometheus_rule.py from deploy/prometheus. Do not edit.\n"


def resource() -> dict[str, Any]:
    groups = [
        group for name in SOURCES for group in yaml.safe_load((DEPLOY / "prometheus" / name).read_text())["groups"]
    ]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "capo"},
        "spec": {"groups": groups},
    }


def text() -> str:
    return _HEADER + yaml.safe_dump(resource(), sort_keys=False, width=120)


if __name__ == "__main__":
    TARGET.write_text(text())
