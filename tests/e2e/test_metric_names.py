"""Every metric and label that dashboards, rules and autoscalers ask for is on the page of a running service.

The long form runs a real Prometheus over a whole workload: tests/soak/test_observability.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.expressions import expressions
from tests.e2e.conftest import Tuned
from tests.e2e.service import Service

pytestmark = [pytest.mark.engine, pytest.mark.training]

# Prometheus itself adds these to every series, and makes these series of its own.
ADDED_LABELS = {"namespace", "instance", "job"}
OF_PROMETHEUS = ("up", "scrape_", "capo:")
# Only while there is something to count: a running job, a failed one, a refused adapter, a wrong key.
ONLY_AT_TIMES = {
    "capo_job_progress_ratio",
    "capo_job_train_loss",
    "capo_job_heartbeat_age_seconds",
    "capo_jobs_failed_total",
    "capo_adapter_refusals_total",
    "capo_access_refusals_total",
}
VALUES_AT_TIMES = {("capo_completion_tokens_total", "adapter", "other")}


def samples(page: str) -> Iterator[tuple[str, dict[str, str]]]:
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            yield sample.name, dict(sample.labels)


def test_every_metric_and_label_that_is_asked_for_exists(service: Service, tuned: dict[str, Tuned]) -> None:
    for result in tuned.values():  # something to measure
        service.client.completions.create(model=result.model, prompt="Hello", max_tokens=4)
        for _ in service.client.completions.create(model=result.model, prompt="Hello", max_tokens=4, stream=True):
            pass
    page = httpx.get(f"{service.url}/metrics").text
    found = list(samples(page))
    names = {name for name, _ in found}
    missing = []
    for expression in expressions():
        for name, labels in expression.metrics:
            if name.startswith(OF_PROMETHEUS) or name in ONLY_AT_TIMES:
                continue
            wanted = {key: value.split("|") for key, value in labels.items() if key not in ADDED_LABELS}
            for key, values in wanted.items():
                has = {given.get(key) for other, given in found if other == name}
                missing += [
                    f"{expression.where}: {name}{{{key}={value!r}}}"
                    for value in values
                    if value not in has and (name, key, value) not in VALUES_AT_TIMES
                ]
            if name not in names:
                missing.append(f"{expression.where}: {name}")
    assert missing == []


def test_the_page_says_what_an_inference_pool_asks(service: Service, tuned: dict[str, Tuned]) -> None:
    """The names of the Gateway API's inference extension; an adapter is found under every name that it is called by."""
    model = tuned["support"].model
    service.client.completions.create(model=model, prompt="Hello", max_tokens=1)
    found = dict(reversed(list(samples(httpx.get(f"{service.url}/metrics").text))))
    assert {"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"} <= found.keys()
    info = found["vllm:lora_requests_info"]
    assert int(info["max_lora"]) >= 1
    assert {model, tuned["support"].artifact.revision} <= set(info["running_lora_adapters"].split(","))
