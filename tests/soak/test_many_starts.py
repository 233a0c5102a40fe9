"""A service over a thousand adapters starts as fast as one over ten. Only in the long form: it starts ten services."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry import BaseModel, Registry
from tests.e2e.service import running
from tests.soak.adapters import publish_random
from tests.soak.conftest import ENGINE_ARGUMENTS
from tests.soak.figures import Figures

pytestmark = pytest.mark.engine

FEW, MANY = 10, 1000
REPEATS = 5
MOST_SLOWDOWN = 1.05


def test_a_thousand_adapters_start_like_ten(tmp_path: Path, base: BaseModel, figures: Figures) -> None:
    starts: dict[int, list[float]] = {FEW: [], MANY: []}
    for number in starts:
        registry = Registry(tmp_path / str(number) / "registry")
        for seed in range(number):
            publish_random(registry, base, f"adapter{seed}", rank=4, seed=seed)
    for repeat in range(REPEATS):
        for number in (FEW, MANY) if repeat % 2 == 0 else (MANY, FEW):  # the machine's own pace drifts
            with running(tmp_path / str(number), *ENGINE_ARGUMENTS) as service:
                starts[number].append(service.start_seconds)
    ratio = min(starts[MANY]) / min(starts[FEW])
    figures.record(
        f"start over {MANY} adapters against {FEW}",
        repeats=REPEATS,
        fastest_seconds_few=min(starts[FEW]),
        fastest_seconds_many=min(starts[MANY]),
        all_seconds_few=", ".join(f"{seconds:.1f}" for seconds in starts[FEW]),
        all_seconds_many=", ".join(f"{seconds:.1f}" for seconds in starts[MANY]),
        ratio=ratio,
    )
    assert ratio <= MOST_SLOWDOWN
