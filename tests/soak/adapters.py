"""Adapters for the proofs: random weights, strong enough that every revision answers unlike every other."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.adapters import write_random_adapter
from registry import Artifact, BaseModel, Registry

STRONG = 0.16
"""Standard deviation of the weights. From about 0.1 on capo-tiny's answers differ from the first token on; at 0.02
hardly one does."""


def publish_random(
    registry: Registry, base: BaseModel, name: str, *, rank: int, seed: int, scale: float = STRONG
) -> Artifact:
    """Import a random adapter as a user would: from a directory that PEFT could have written."""
    with tempfile.TemporaryDirectory(prefix="soak-adapter-") as folder:
        source = write_random_adapter(Path(folder) / "adapter", base, rank=rank, seed=seed, scale=scale)
        return registry.import_adapter(source, name=name, base_model=base)


@contextlib.contextmanager
def published(
    registry: Registry, base: BaseModel, names: Sequence[str], *, rank: int, first_seed: int = 0
) -> Iterator[list[Artifact]]:
    """One adapter for each name (the same name twice: two revisions of it); they are removed again at the end."""
    artifacts: list[Artifact] = []
    try:
        for number, name in enumerate(names):
            artifacts.append(publish_random(registry, base, name, rank=rank, seed=first_seed + number))
        yield artifacts
    finally:
        for artifact in artifacts:
            registry.remove(artifact.revision, force=True)
