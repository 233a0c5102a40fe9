"""Metric labels of adapters: the busiest have their own, and their number is bounded."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from serve.adapter_labels import BASE_LABEL, OTHER_LABEL, AdapterLabels
from serve.metrics import Metrics


@given(st.lists(st.sampled_from("abcdefgh"), max_size=300))
def test_there_are_never_more_labels_than_allowed(names: list[str]) -> None:
    live: set[str] = set()
    labels = AdapterLabels(3, live.discard)
    for name in names:
        label = labels.of(name)
        assert label in (name, OTHER_LABEL)
        if label == name:
            live.add(name)
        assert len(live) <= 3


def test_a_busy_latecomer_takes_over_an_idle_adapters_label() -> None:
    dropped: list[str] = []
    labels = AdapterLabels(2, dropped.append)
    for name in ("idle", "busy", "busy", "busy"):
        labels.of(name)
    seen = Counter(labels.of("late") for _ in range(10))
    assert seen["late"] > 5
    assert dropped == ["idle"]
    assert labels.of("busy") == "busy"


def test_old_fame_fades() -> None:
    now = 0.0
    labels = AdapterLabels(1, lambda name: None, clock=lambda: now)
    for _ in range(1000):
        labels.of("star")
    now = 7200.0
    assert "new" in [labels.of("new") for _ in range(5)]


def test_the_base_model_needs_no_place() -> None:
    labels = AdapterLabels(0, lambda name: None)
    assert labels.of(None) == BASE_LABEL
    assert labels.of("a") == OTHER_LABEL


def test_a_forgotten_adapters_series_leave_the_page() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, max_adapters=2)
    for name in ("a", "b", "c"):
        metrics.time_to_first_token.labels(metrics.adapter_label(name), "http").observe(0.1)
    page = generate_latest(registry).decode()
    assert 'adapter="a"' in page
    assert 'adapter="other"' in page
    assert 'adapter="c"' not in page
    metrics.forget_adapter("a")
    assert 'adapter="a"' not in generate_latest(registry).decode()


def test_an_adapter_of_the_shared_labels_name_takes_nothing_of_it_along() -> None:
    dropped: list[str] = []
    labels = AdapterLabels(2, dropped.append)
    assert [labels.of(name) for name in (OTHER_LABEL, "one", "two")] == [OTHER_LABEL, "one", "two"]
    labels.forget(OTHER_LABEL)
    assert dropped == []
