"""Which adapters a quantised copy of a base takes, and what its probes must agree on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from registry import Probe, Registry, errors, locate_base_model
from serve.engine_api import EngineAdapter
from serve.gate import Gate
from tests.registry.samples import write_adapter, write_base
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_gate import LIMITS, publish_unchecked


@pytest.mark.parametrize(("made_from", "is_taken"), [("base", True), ("something merged", False)])
async def test_a_quantised_copy_takes_adapters_of_exactly_the_model_it_was_made_from(
    tmp_path: Path, made_from: str, is_taken: bool
) -> None:
    registry = Registry(tmp_path / "registry")
    base = locate_base_model(str(write_base(tmp_path / "base")))
    adapter = publish_unchecked(registry, write_adapter(tmp_path / "adapter"), base)
    fingerprint = base.identity.fingerprint if made_from == "base" else "0" * 64
    other = base.identity.model_copy(update={"fingerprint": "1" * 64})
    gate = Gate(registry, replace(base, identity=other, quantized_from=fingerprint))
    if is_taken:
        await gate.check(adapter, LIMITS)
    else:
        with pytest.raises(errors.InvalidArtifactError) as caught:
            await gate.check(adapter, LIMITS)
        assert caught.value.code == "base_mismatch"


@pytest.mark.parametrize(("expected", "share"), [([0, 0, 0, 0], 1.0), ([0, 0, 0, 1], 0.75), ([0, 1, 1, 1], None)])
async def test_over_a_quantised_copy_half_of_the_probe_tokens_must_agree(
    tmp_path: Path, expected: list[int], share: float | None
) -> None:
    engine = FakeEngine()  # answers with token 0
    await engine.start()
    registry = Registry(tmp_path / "registry")
    base = locate_base_model(str(write_base(tmp_path / "base")))
    probes = [Probe(prompt_token_ids=[5, 6], completion_token_ids=expected)]
    artifact = publish_unchecked(registry, write_adapter(tmp_path / "adapter"), base, probes=probes)
    adapter = EngineAdapter(artifact.revision, 1, artifact.path)
    gate = Gate(registry, replace(base, quantized_from="0" * 64))
    if share is not None:
        assert await gate.probe(artifact, engine, adapter) == share
        return
    with pytest.raises(errors.InvalidArtifactError) as caught:
        await gate.probe(artifact, engine, adapter)
    assert caught.value.code == "probe_mismatch"
