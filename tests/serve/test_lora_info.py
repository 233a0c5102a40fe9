"""The gauge by which a router finds the replica that has an adapter, whatever name a request calls it by."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry

from registry import CanaryRequest, Registry
from serve.engine_api import EngineAdapter
from serve.lora_info import LORA_REQUESTS_INFO, LoraRequestsInfo, names_of
from serve.resident import AdapterState, Resident
from tests.serve.running import publish


async def test_an_adapter_stands_under_its_revision_and_every_alias_whose_requests_may_reach_it(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    one, two = (publish(registry, "support", content) for content in ("one", "two"))
    registry.set_alias("prod", one.revision, canary=CanaryRequest(two.revision, 10))
    registry.set_alias("beta", two.revision)
    residents = [Resident(artifact, EngineAdapter(artifact.revision, 1, artifact.path)) for artifact in (one, two)]
    residents[0].state = AdapterState.LOADED
    page = CollectorRegistry()
    page.register(LoraRequestsInfo(lambda: residents, lambda revision: names_of(registry.aliases(), revision), 4))
    ((sample,),) = (family.samples for family in page.collect())
    assert sample.name == LORA_REQUESTS_INFO
    assert sample.labels["max_lora"] == "4"
    assert set(sample.labels["running_lora_adapters"].split(",")) == {one.revision, "prod"}
    assert set(sample.labels["waiting_lora_adapters"].split(",")) == {two.revision, "prod", "beta"}
