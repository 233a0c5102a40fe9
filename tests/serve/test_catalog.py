"""The catalog's picture of the registry: shared reads, and no read counted that was not whole."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import Artifact, CanaryRequest, Manifest, Registry, errors
from serve.catalog import Catalog, Snapshot
from tests.registry.samples import draft
from tests.serve.running import BASE, eventually, publish


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


async def test_a_bug_while_the_registry_is_read_is_logged_and_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(tmp_path)
    catalog = Catalog(registry, BASE, poll_seconds=0.01)
    watching = asyncio.create_task(catalog.watch())
    try:
        with monkeypatch.context() as broken:
            broken.setattr(registry, "change_token", lambda **_: [][1])
            await eventually(lambda: "list index out of range" in caplog.text)
        artifact = await asyncio.to_thread(publish, registry, "support")
        await eventually(lambda: artifact.revision in catalog.snapshot.artifacts)
    finally:
        watching.cancel()


async def test_what_is_damaged_is_found_again_when_it_was_mended_in_place(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    artifact = publish(registry, "support")
    manifest = artifact.path / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    catalog = Catalog(registry, BASE, scan_seconds=0)
    await catalog.refresh()
    assert (list(catalog.snapshot.artifacts), list(catalog.snapshot.damaged)) == ([], [artifact.revision])
    manifest.write_bytes(content)
    await catalog.refresh()
    assert (list(catalog.snapshot.artifacts), list(catalog.snapshot.damaged)) == ([artifact.revision], [])


@given(
    digests=st.lists(st.text("ab", min_size=64, max_size=64), unique=True, max_size=12),
    prefix=st.text("ab", max_size=64),
)
def test_a_prefix_means_what_a_search_through_everything_finds(digests: list[str], prefix: str) -> None:
    """Digests of two letters, so that prefixes meet; 8 digits are the fewest, and two matches are none."""
    artifacts = [_artifact("support", digest) for digest in digests] + [_artifact("other", d) for d in digests]
    if len({artifact.revision for artifact in artifacts}) < len(artifacts):
        return  # no registry holds two of one revision
    matches = [a for a in artifacts if a.name == "support" and a.digest.startswith(prefix)]
    expected = matches[0] if len(matches) == 1 and len(prefix) >= 8 else None
    assert Snapshot.of(artifacts, []).artifact(f"support@{prefix}") == expected


async def test_looking_up_costs_the_same_among_ten_adapters_and_among_ten_thousand(tmp_path: Path) -> None:
    best: dict[int, float] = {}
    for size in (10, 10_000):
        artifacts = [_artifact(f"name-{n % 100}", hashlib.sha256(str(n).encode()).hexdigest()) for n in range(size)]
        wanted = artifacts[size // 2]
        catalog = Catalog(Registry(tmp_path / str(size)), BASE)
        catalog._snapshot = Snapshot.of(artifacts, [])
        times = []
        for _ in range(300):
            started = time.perf_counter()
            target = await catalog.resolve(f"{wanted.name}@{wanted.digest[:12]}")
            times.append(time.perf_counter() - started)
        assert target.artifact == wanted
        best[size] = min(times)
    assert best[10_000] < 3 * best[10], best


async def test_what_was_done_to_the_directory_by_hand_is_seen_by_the_slow_look(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    artifact = publish(registry, "support")
    other = publish(registry, "support", "other")
    catalog = Catalog(registry, BASE, poll_seconds=0.01, scan_seconds=0.2)
    watcher = asyncio.create_task(catalog.watch())
    await eventually(lambda: len(catalog.snapshot.artifacts) == 2)
    artifact.path.rename(tmp_path / "trash" / "x")
    await eventually(lambda: set(catalog.snapshot.artifacts) == {other.revision}, seconds=1)
    watcher.cancel()


async def test_changes_of_a_registry_are_seen_by_the_quick_look(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    artifact = publish(registry, "support")
    catalog = Catalog(registry, BASE, poll_seconds=0.01, scan_seconds=3600)
    watcher = asyncio.create_task(catalog.watch())
    writer = Registry(tmp_path)
    for number in range(30):
        other = await asyncio.to_thread(publish, writer, "support", f"content {number}")
        await eventually(lambda revision=other.revision: revision in catalog.snapshot.artifacts, seconds=1)  # type: ignore[misc]
        canary = CanaryRequest(artifact.revision, 1 + number)
        record = await asyncio.to_thread(writer.set_alias, "prod", other.revision, canary=canary)
        await eventually(lambda record=record: catalog.snapshot.aliases.get("prod") == record, seconds=1)  # type: ignore[misc]
    watcher.cancel()


def _artifact(name: str, digest: str) -> Artifact:
    manifest = Manifest.from_draft(draft(name), files={}, created_at=1)
    return Artifact(name, digest, Path("nowhere"), manifest)
