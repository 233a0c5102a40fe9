"""What a running service shows of itself: metrics, adapter states, memory of its processes."""

from __future__ import annotations

import re
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.service import Service

_LOADED = re.compile(r"serve\.pool: loaded (\S+) in ([0-9.]+) s")


def samples(service: Service) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every series of the metrics page by name and labels."""
    page = httpx.get(f"{service.url}/metrics", timeout=30).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def metric(service: Service, name: str) -> float:
    """The sum of one metric over all its labels; 0 while it has no series."""
    return sum(value for (found, _), value in samples(service).items() if found == name)


def capo_series(service: Service) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    return {key for key in samples(service) if key[0].startswith("capo_")}


def adapter_views(service: Service) -> dict[str, dict[str, Any]]:
    """``GET /v1/adapters`` by revision."""
    listed = httpx.get(f"{service.url}/v1/adapters", timeout=30).json()["data"]
    return {view["revision"]: view for view in listed}


def load_seconds(service: Service) -> dict[str, float]:
    """How long the last load of each revision took, by the service's log: an adapter may be gone again by now."""
    return {found[1]: float(found[2]) for found in _LOADED.finditer(service.log())}


def memory_bytes(service: Service) -> dict[str, int]:
    """Resident set size of each process of the service, by role.

    Not the proportional one, which grows when some other program that maps the same libraries ends.
    """
    roles: dict[str, int] = {}
    for process in service.processes():
        role = "service" if process.pid == service.process.pid else _role(process)
        roles[role] = roles.get(role, 0) + process.memory_info().rss
    return roles


def _role(process: psutil.Process) -> str:
    told = process.name() + " ".join(process.cmdline())
    return next((role for role in ("EngineCore", "forkserver", "resource_tracker") if role in told), "other")
