"""The catalog's picture of the registry: shared reads, and no read counted that was not whole."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from registry import Registry, errors
from serve.catalog import Catalog
from tests.serve.running import BASE, publish


async def test_a_read_that_was_cut_short_counts_for_nobody_else(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    catalog = Catalog(registry, BASE)
    may_read = threading.Event()
    token = registry.change_token

    def slow_token(*, thorough: bool = False) -> object:
        may_read.wait(5)
        return token(thorough=thorough)

    registry.change_token = slow_token  # type: ignore[method-assign]
    first = asyncio.create_task(catalog.refresh())
    await asyncio.sleep(0.02)
    artifact = await asyncio.to_thread(publish, Registry(tmp_path), "support")
    second = asyncio.create_task(catalog.resolve(artifact.revision))
    await asyncio.sleep(0.02)
    first.cancel()
    may_read.set()
    assert (await second).artifact == artifact


async def test_many_unknown_names_at_once_share_reads(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    catalog = Catalog(registry, BASE)
    token, reads = registry.change_token, []

    def counted_token(*, thorough: bool = False) -> object:
        if not thorough:
            reads.append(1)
        return token(thorough=thorough)

    registry.change_token = counted_token  # type: ignore[method-assign]
    answers = await asyncio.gather(
        *(catalog.resolve(f"nobody{number}") for number in range(200)), return_exceptions=True
    )
    assert all(isinstance(answer, errors.ModelNotFoundError) for answer in answers)
    assert len(reads) <= 3


async def test_a_registry_that_cannot_be_read_makes_an_unknown_name_a_503_and_keeps_known_ones(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    artifact = publish(registry, "support")
    catalog = Catalog(registry, BASE)
    await catalog.refresh()

    def fail(*, thorough: bool = False) -> object:
        raise errors.StorageError("the disk is gone")

    registry.change_token = fail  # type: ignore[method-assign,assignment]
    assert (await catalog.resolve(artifact.revision)).artifact == artifact
    with pytest.raises(errors.UnavailableError):
        await catalog.resolve("unknown")
