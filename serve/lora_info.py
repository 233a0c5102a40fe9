"""``vllm:lora_requests_info`` as the Gateway API's inference extension reads it, so that an InferencePool routes a
request for an adapter to a replica that has it (its docs/proposals/003-model-server-protocol).

vLLM's own gauge makes a new series for every combination of adapters and removes none; here there is one series.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from registry import Alias
from serve.resident import AdapterState, Resident

LORA_REQUESTS_INFO = "vllm:lora_requests_info"


def names_of(aliases: Iterable[Alias], revision: str) -> list[str]:
    """The aliases whose requests may reach it, also those that have it as their canary."""
    return [
        alias.alias
        for alias in aliases
        if revision == alias.revision or (alias.canary is not None and revision == alias.canary.revision)
    ]


class LoraRequestsInfo(Collector):
    """``names_of`` gives every name under which clients call a revision; both callables are asked from any thread."""

    def __init__(
        self,
        residents: Callable[[], Sequence[Resident]],
        names_of: Callable[[str], Sequence[str]],
        max_loras: int,
    ) -> None:
        self._residents = residents
        self._names_of = names_of
        self._max_loras = max_loras

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running: list[str] = []
        waiting: list[str] = []
        for resident in self._residents():
            revision = resident.artifact.revision
            names = waiting if resident.state is AdapterState.LOADING else running
            names += [*self._names_of(revision), revision]
        family = GaugeMetricFamily(
            LORA_REQUESTS_INFO,
            "Adapters in the engine and on their way into it, by every name that requests may use; value: Unix time.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        family.add_metric((str(self._max_loras), ",".join(running), ",".join(waiting)), time.time())
        yield family
