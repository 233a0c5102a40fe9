"""The metrics page with a thousand adapters: bounded in size and quick, whatever protocols and outcomes there were."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, generate_latest

from capo.settings import Settings
from serve.metrics import OUTCOMES, PROTOCOLS, Metrics


def test_a_page_with_a_thousand_busy_adapters_is_small_and_quick() -> None:
    registry = CollectorRegistry()
    bound = Settings().max_metric_adapters
    metrics = Metrics(registry, max_adapters=bound)
    for round_ in range(2):
        for number in range(1000):
            label = metrics.settled_label(metrics.adapter_label(f"adapter-with-a-name-of-usual-length-{number}"))
            for protocol in PROTOCOLS:
                metrics.time_to_first_token.labels(label, protocol).observe(round_)
                metrics.inter_token_latency.labels(label, protocol).observe(0.01)
                metrics.e2e_latency.labels(label, protocol).observe(1.0)
            for outcome in OUTCOMES:
                metrics.outcomes.labels(label, outcome).inc()
            metrics.queue_wait.labels(label).observe(0.01)
            metrics.prompt_tokens.labels(label).inc(10)
            metrics.completion_tokens.labels(label).inc(10)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        page = generate_latest(registry)
        seconds.append(time.perf_counter() - began)
    assert page.count(b"capo_prompt_tokens_total{") == bound + 1
    assert len(page) <= 2_000_000
    assert min(seconds) <= 0.2, "another process's load may slow one rendering down, not five"
