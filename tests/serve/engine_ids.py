"""What the engine itself says it holds, beside what the pool believes. Run by engine_runs.py, in its engine."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from bench.adapters import write_random_adapter
from registry import Artifact, BaseModel, Registry
from registry.errors import InvalidArtifactError
from serve.engine_api import Engine, EngineAdapter
from serve.gate import Gate
from serve.metrics import Metrics
from serve.pool import AdapterPool

NUM_ADAPTERS = 5
NUM_USES = 60


async def compare(engine: Engine, base: BaseModel, folder: Path) -> list[dict[str, Any]]:
    """Load, evict, remove and fail to load; after each step the ids of both sides, in order."""
    registry = Registry(folder / "registry")
    artifacts = []
    for number in range(NUM_ADAPTERS):
        source = write_random_adapter(folder / f"a{number}", base, rank=4, seed=number)
        artifacts.append(registry.import_adapter(source, name=f"a{number}", base_model=base))
    metrics = Metrics(CollectorRegistry())
    pool = AdapterPool(engine, Gate(registry, base), metrics, turn_seconds=0.01)
    running = asyncio.create_task(pool.run())
    steps: list[dict[str, Any]] = []

    async def note(step: str) -> None:
        # Who left last may still be on its way out; afterwards nothing moves until somebody asks.
        await asyncio.sleep(0.3)
        steps.append(
            {
                "step": step,
                "engine": sorted(await engine.loaded_engine_ids()),
                "pool": sorted(resident.adapter.engine_id for resident in pool.residents()),
            }
        )

    await note("nothing loaded")
    for number in range(2):
        await use(pool, artifacts[number])
        await note(f"load of a{number}")
    for number in range(2, NUM_ADAPTERS):
        await use(pool, artifacts[number])
        await note(f"load of a{number} and eviction of a{number - 2}")
    random_of = random.Random(0)
    await asyncio.gather(*(use(pool, random_of.choice(artifacts)) for _ in range(NUM_USES)))
    await note("many at once, which take turns")
    one, other = [resident.artifact.revision for resident in pool.residents()]
    pool.withdraw(one)
    await note("removal of one")
    # Into the free slot, as the pool would: with none free, vLLM makes room before it looks at what it is given.
    for rank in (4, 64):  # of a wrong shape, which shows when the weights are copied; and above what is checked first
        path = broken(folder / f"broken{rank}", base, rank)
        await refused(engine, EngineAdapter(f"broken{rank}", 9000 + rank, path))
        await note(f"load that the engine refuses, of rank {rank}")
    pool.withdraw(other)
    await note("removal of the other")
    running.cancel()
    return steps


async def use(pool: AdapterPool, artifact: Artifact) -> None:
    async with pool.use(artifact):
        await asyncio.sleep(0.02)


def broken(folder: Path, base: BaseModel, rank: int) -> Path:
    """An adapter that no gate would let through: every tensor of B has twice its rows."""
    from safetensors.numpy import load_file, save_file

    path = write_random_adapter(folder, base, rank=rank, seed=0) / "adapter_model.safetensors"
    doubled = {name: w.repeat(2, axis=0) if "lora_B" in name else w for name, w in load_file(path).items()}
    save_file(doubled, path)
    return folder


async def refused(engine: Engine, adapter: EngineAdapter) -> None:
    try:
        await engine.load_adapter(adapter)
    except InvalidArtifactError:
        return
    raise AssertionError(f"the engine took {adapter}")
