"""What Capo measures about serving, by adapter, with bounded cardinality.

Engines label latency by base model only; these are measured at Capo's own edge. The ``adapter`` label is the adapter's
name (not its revision): at most ``max_adapters`` names have series of their own, the rest share ``other``, and a name's
series go when the adapter goes.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

BASE_LABEL = "base"
OTHER_LABEL = "other"

# 5 ms (a tiny model's token) to 120 s (a long answer on a CPU), about 1.8 times each step.
SECONDS_BUCKETS = (
    0.005, 0.01, 0.02, 0.035, 0.06, 0.1, 0.18, 0.3, 0.5, 0.9, 1.5, 2.5, 4.5, 8.0, 15.0, 30.0, 60.0, 120.0,
)  # fmt: skip


class Metrics:
    """One service's metrics; hold one per Prometheus registry. Not thread-safe beyond prometheus_client's own."""

    def __init__(self, registry: CollectorRegistry = REGISTRY, *, max_adapters: int = 100) -> None:
        self._max_adapters = max_adapters
        self._labels: dict[str, str] = {}

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(name, text, ("adapter", *labels), buckets=SECONDS_BUCKETS, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.time_to_first_token = histogram(
            "capo_time_to_first_token_seconds", "From receiving a request to its first token.", "protocol"
        )
        self.inter_token_latency = histogram(
            "capo_inter_token_latency_seconds",
            "Between consecutive tokens of one answer (streams only).",
            "protocol",
        )
        self.e2e_latency = histogram(
            "capo_e2e_request_latency_seconds", "From receiving a request to its end.", "protocol", "outcome"
        )
        self.queue_wait = histogram("capo_request_queue_seconds", "Waiting in the engine's queue.", "protocol")
        self.prompt_tokens = counter("capo_prompt_tokens_total", "Prompt tokens read.", "adapter")
        self.completion_tokens = counter("capo_completion_tokens_total", "Tokens generated.", "adapter")
        self.in_flight = Gauge("capo_requests_in_flight", "Requests being answered.", ("adapter",), registry=registry)
        self._loads = counter("capo_adapter_loads_total", "Adapters loaded into the engine.")
        self._load_seconds = Histogram(
            "capo_adapter_load_seconds", "Loading one adapter into the engine.", buckets=SECONDS_BUCKETS,
            registry=registry,
        )  # fmt: skip
        self._evictions = counter("capo_adapter_evictions_total", "Idle adapters unloaded to make room.")
        self._refusals = counter("capo_adapter_refusals_total", "Adapters refused by the gate.", "reason")
        self._alias_flips = counter("capo_alias_flips_total", "Aliases seen to point to another revision.")
        self._resident = Gauge("capo_adapters_resident", "Adapters in the engine.", registry=registry)
        self.engine_restarts = counter("capo_engine_restarts_total", "Times the engine was started again.")
        self.ready = Gauge("capo_ready", "1 while the service takes requests.", registry=registry)
        self._by_adapter: list[Histogram | Counter | Gauge] = [
            self.time_to_first_token,
            self.inter_token_latency,
            self.e2e_latency,
            self.queue_wait,
            self.prompt_tokens,
            self.completion_tokens,
            self.in_flight,
        ]

    def adapter_label(self, name: str | None) -> str:
        """The label value for an adapter's name; ``None`` is the base model."""
        if name is None:
            return BASE_LABEL
        if name in self._labels:
            return self._labels[name]
        if len(self._labels) >= self._max_adapters:
            return OTHER_LABEL
        self._labels[name] = name
        return name

    def forget_adapter(self, name: str) -> None:
        """Remove the series of an adapter that is gone."""
        if self._labels.pop(name, None) is None:
            return
        for metric in self._by_adapter:
            metric.remove_by_labels({"adapter": name})

    def adapter_loaded(self, seconds: float) -> None:
        self._loads.inc()
        self._load_seconds.observe(seconds)

    def adapter_evicted(self) -> None:
        self._evictions.inc()

    def adapter_refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def alias_flipped(self) -> None:
        self._alias_flips.inc()

    def watch_pool(self, count: Callable[[], int]) -> None:
        self._resident.set_function(count)
