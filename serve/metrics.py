"""What Capo measures about serving, by adapter, with bounded cardinality.

Engines label latency by base model only; these are measured at Capo's own edge. The ``adapter`` label is the adapter's
name (not its revision), bounded by :mod:`serve.adapter_labels`.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from serve.adapter_labels import MAX_LABELLED_ADAPTERS, AdapterLabels

# 5 ms (a tiny model's token) to 120 s (a long answer on a CPU), about 1.8 times each step.
SECONDS_BUCKETS = (
    0.005, 0.01, 0.02, 0.035, 0.06, 0.1, 0.18, 0.3, 0.5, 0.9, 1.5, 2.5, 4.5, 8.0, 15.0, 30.0, 60.0, 120.0,
)  # fmt: skip


PROTOCOLS = ("http", "grpc")
OUTCOMES = ("ok", "client_error", "server_error", "draining", "cancelled")
"""How a request may end. ``draining``: sent to a process that is shutting down, which its health checks said."""


class Metrics:
    """One service's metrics; hold one per Prometheus registry. Not thread-safe beyond prometheus_client's own."""

    def __init__(self, registry: CollectorRegistry = REGISTRY, *, max_adapters: int = MAX_LABELLED_ADAPTERS) -> None:
        self._labels = AdapterLabels(max_adapters, self._drop_series)
        # Else every series has a second one that says when it began, which nothing here asks for.
        disable_created_metrics()

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
            "capo_e2e_request_latency_seconds", "From receiving a request to the end of its answer.", "protocol"
        )
        # Of both protocols alike: it is one queue.
        self.queue_wait = histogram("capo_request_queue_seconds", "Waiting in the engine's queue.")
        self.adapter_wait = histogram(
            "capo_adapter_wait_seconds",
            "Waiting for the adapter to be in the engine: gate, slot and load. Next to nothing where it is.",
        )
        # Outcomes are counted apart: as a label of the histogram they would be most of the page.
        self.outcomes = counter(
            "capo_adapter_requests_total", "Requests that ran, by how they ended.", "adapter", "outcome"
        )
        self.requests = counter(
            "capo_requests_total",
            "Requests for inference that were ended, those refused before they ran included.",
            "protocol",
            "outcome",
        )
        for protocol in PROTOCOLS:
            for outcome in OUTCOMES:
                self.requests.labels(protocol, outcome)  # a rate needs a zero to start from
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
        self._refused_at = Gauge(
            "capo_adapter_refused_timestamp_seconds", "Unix time of the newest refusal; 0: none yet.", registry=registry
        )
        self._alias_flips = counter("capo_alias_flips_total", "Aliases seen to point to another revision.")
        self._canary_requests = counter(
            "capo_alias_requests_total", "Requests to aliases that run a canary.", "alias", "arm", "outcome"
        )
        self._resident = Gauge("capo_adapters_resident", "Adapters in the engine.", registry=registry)
        self._pinned = Gauge("capo_adapters_pinned", "Adapters that stay in the engine.", registry=registry)
        self.engine_restarts = counter("capo_engine_restarts_total", "Times the engine was started again.")
        self.event_loop_lag = Histogram(
            "capo_event_loop_lag_seconds",
            "How late the event loop wakes a sleeper: what every stream waits on top of the engine.",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0),
            registry=registry,
        )
        self.ready = Gauge("capo_ready", "1 while the service takes requests.", registry=registry)
        self._by_adapter: list[Histogram | Counter | Gauge] = [
            self.time_to_first_token,
            self.inter_token_latency,
            self.e2e_latency,
            self.outcomes,
            self.queue_wait,
            self.adapter_wait,
            self.prompt_tokens,
            self.completion_tokens,
            self.in_flight,
        ]

    def adapter_label(self, name: str | None) -> str:
        """The label value for one more request of an adapter; ``None`` is the base model."""
        return self._labels.of(name)

    def settled_label(self, label: str) -> str:
        """``label`` at a request's end: its series may have gone meanwhile and must not come back."""
        return self._labels.settled(label)

    def forget_adapter(self, name: str) -> None:
        """Remove the series of an adapter that is gone."""
        self._labels.forget(name)

    def _drop_series(self, name: str) -> None:
        for metric in self._by_adapter:
            metric.remove_by_labels({"adapter": name})

    def adapter_loaded(self, seconds: float) -> None:
        self._loads.inc()
        self._load_seconds.observe(seconds)

    def adapter_evicted(self) -> None:
        self._evictions.inc()

    def adapter_refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()
        # A counter's first step is invisible to a rate, because its series begins with it; an alert needs this.
        self._refused_at.set_to_current_time()

    def alias_flipped(self) -> None:
        self._alias_flips.inc()

    def alias_request(self, alias: str, arm: str, outcome: str) -> None:
        """One request to an alias with a canary; the ``adapter`` label cannot tell its two revisions apart."""
        self._canary_requests.labels(alias, arm, outcome).inc()

    def canary_ended(self, alias: str) -> None:
        """Remove the alias's series, so that they are no more than the canaries that run."""
        self._canary_requests.remove_by_labels({"alias": alias})

    def watch_pool(self, resident: Callable[[], int], pinned: Callable[[], int]) -> None:
        self._resident.set_function(resident)
        self._pinned.set_function(pinned)
