"""Hundreds of broken and hostile adapters in the registry: none reaches the engine, and nobody else notices."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from registry import BaseModel
from tests.e2e.service import Service
from tests.sizes import size
from tests.soak.adapters import published
from tests.soak.damage import kinds
from tests.soak.figures import Figures
from tests.soak.hostile import Planted, plant
from tests.soak.observe import adapter_views, metric, samples

pytestmark = pytest.mark.engine

NUM_HOSTILE = size(60, 500)
SEED = 20_261_121


@contextmanager
def planted(service: Service, base: BaseModel) -> Iterator[list[Planted]]:
    """As many hostile adapters as asked for, all kinds of damage in turn; gone again at the end."""
    root = service.registry.root
    random_of = random.Random(SEED)
    damages = random_of.sample(kinds(), len(kinds()))
    try:
        yield [
            plant(root, base, f"hostile{number}", damages[number % len(damages)], random_of)
            for number in range(NUM_HOSTILE)
        ]
    finally:
        for path in (*root.glob("artifacts/hostile*"), root.parent / "planting"):
            shutil.rmtree(path)


def tokens_of(service: Service, model: str) -> list[int]:
    body = {"model": model, "prompt": "In the village", "max_tokens": 16, "temperature": 0, "return_token_ids": True}
    response = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])


def test_no_hostile_adapter_reaches_the_engine(service: Service, base: BaseModel, figures: Figures) -> None:
    with published(service.registry, base, ["good"], rank=4) as (good,):
        models = ["capo-tiny", good.revision]
        before = {model: tokens_of(service, model) for model in models}
        engine_pid = service.engine_pid()
        loads = metric(service, "capo_adapter_loads_total")
        refused_before = refusals(service)
        with planted(service, base) as hostile:
            began_at = time.monotonic()
            answers = {one.revision: ask(service, one.revision) for one in hostile}
            seconds = time.monotonic() - began_at
            views = adapter_views(service)
            refused = refusals(service) - refused_before
            wrong_status = [
                (one.kind, answers[one.revision])
                for one in hostile
                if answers[one.revision][0] != (400 if one.is_artifact else 404)
            ]
            states = {one: views[one.revision] for one in hostile if one.revision in views}
            wrong_reason = [
                (one.kind, view["state"], view["reason"])
                for one, view in states.items()
                if view["reason"] is None or view["reason"]["code"] not in one.codes
            ]
            codes = Counter(str(view["reason"]["code"]) for view in states.values() if view["reason"])
            after = {model: tokens_of(service, model) for model in models}
        figures.record(
            "hostile adapters",
            adapters=NUM_HOSTILE,
            kinds=len({one.kind for one in hostile}),
            refused_by_the_gate=sum(one.is_artifact for one in hostile),
            no_artifact_at_all=sum(not one.is_artifact for one in hostile),
            reasons=len(codes),
            reached_the_engine=int(metric(service, "capo_adapter_loads_total") - loads),
            engine_restarts=int(service.engine_pid() != engine_pid),
            ms_per_refusal=1000 * seconds / NUM_HOSTILE,
        )
    assert len(hostile) == NUM_HOSTILE
    assert wrong_status == []
    assert wrong_reason == []
    assert len(states) == len(hostile)
    assert {code: refused[code] for code in codes} == dict(codes)
    assert metric(service, "capo_adapter_loads_total") == loads
    assert service.engine_pid() == engine_pid
    assert after == before
    assert before["capo-tiny"] != before[good.revision]


def ask(service: Service, model: str) -> tuple[int, str]:
    body = {"model": model, "prompt": "a", "max_tokens": 1}
    response = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60)
    return response.status_code, str(response.json().get("error", {}).get("code"))


def refusals(service: Service) -> Counter[str]:
    return Counter(
        {
            dict(labels)["reason"]: int(value)
            for (name, labels), value in samples(service).items()
            if name == "capo_adapter_refusals_total"
        }
    )


def test_every_kind_of_damage_makes_an_adapter_that_the_sound_one_is_not(tmp_path: Path, base: BaseModel) -> None:
    """The generator itself: each kind writes something, and without damage the checks find nothing."""
    from registry import Registry, check_adapter
    from tests.soak.hostile import Damage

    root = tmp_path / "registry"
    registry = Registry(root)
    sound = plant(root, base, "sound", Damage("none", frozenset(), lambda case: None), random.Random(0))
    artifact = registry.resolve(sound.revision)
    assert registry.verify(sound.revision) == []
    assert check_adapter(artifact.path, base_model=base).notes == ()
    assert len(kinds()) > 80
    assert len({damage.kind for damage in kinds()}) == len(kinds())
    assert os.access(root, os.W_OK)
