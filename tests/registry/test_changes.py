"""Noticing changes: no change is missed, and looking costs the same whatever the registry holds."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry import Artifact, CanaryRequest, Filesystem, Registry
from registry.errors import StorageError
from tests.registry.samples import draft


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def _publish(registry: Registry, content: str, **options: str) -> Artifact:
    with registry.stage() as staging:
        (staging / "model.safetensors").write_text(content)
        return registry.publish(staging, draft(), **options)  # type: ignore[arg-type]


def test_the_change_token_differs_after_every_change_however_fast(registry: Registry) -> None:
    first, second = _publish(registry, "one"), _publish(registry, "two")
    tokens = [registry.change_token()]

    def note(_: object) -> None:
        tokens.append(registry.change_token())

    for index in range(100):
        note(registry.set_alias("prod", (first, second)[index % 2].revision))
    note(registry.set_alias("prod", second.revision, canary=CanaryRequest(first.revision, 10)))
    note(registry.rollback_alias("prod"))
    note(registry.rollback_alias("prod"))
    registry.remove_alias("prod")
    note(None)
    note(_publish(registry, "three"))
    registry.remove(second.revision)
    note(None)
    assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize("thorough", [False, True])
def test_the_change_token_stays_while_nothing_changes(registry: Registry, thorough: bool) -> None:
    _publish(registry, "one", alias="prod")
    token = registry.change_token(thorough=thorough)
    registry.resolve("prod")
    registry.verify("prod")
    with registry.stage():
        assert Registry(registry.root, read_only=True).change_token(thorough=thorough) == token


class _DiesAt(Filesystem):
    """Ends its process, as kill -9 does, right before or after the n-th operation that moves or removes a name."""

    def __init__(self, number: int, *, after: bool) -> None:
        self._left = number
        self._after = after

    def rename(self, source: Path, target: Path) -> None:
        with self._deadly():
            super().rename(source, target)

    def remove_file(self, path: Path) -> None:
        with self._deadly():
            super().remove_file(path)

    @contextmanager
    def _deadly(self) -> Iterator[None]:
        self._left -= 1
        if self._left == 0 and not self._after:
            os._exit(9)
        yield
        if self._left == 0:
            os._exit(9)


@pytest.mark.parametrize("change", ["set", "canary", "remove alias", "publish", "remove"])
def test_a_writer_that_dies_anywhere_hides_no_change(tmp_path: Path, change: str) -> None:
    """A reader that took its token at any moment before sees another token, whenever what it read is no more true."""
    deaths = 0
    for number in range(1, 20):
        for after in (False, True):
            registry = Registry(tmp_path / f"{number}-{after}")
            first, second = _publish(registry, "one", alias="prod"), _publish(registry, "two")
            reader = Registry(registry.root, read_only=True)
            token, seen = reader.change_token(), (reader.artifacts(), reader.aliases())
            child = os.fork()
            if child == 0:
                writer = Registry(registry.root, filesystem=_DiesAt(number, after=after))
                match change:
                    case "set":
                        writer.set_alias("prod", second.revision)
                    case "canary":
                        writer.set_alias("prod", first.revision, canary=CanaryRequest(second.revision, 10))
                    case "remove alias":
                        writer.remove_alias("prod")
                    case "publish":
                        _publish(writer, "three", alias="prod")
                    case _:
                        writer.remove(second.revision)
                os._exit(0)
            died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
            deaths += died
            between, now = reader.change_token(), (reader.artifacts(), reader.aliases())
            assert token != between or seen == now
            # The next change, by a writer that lives, is seen from whatever the dead one left.
            registry.set_alias("other", first.revision)
            assert reader.change_token() != between
            if not died:
                assert deaths >= 6
                return
    raise AssertionError("the writer never came to its end")


def test_a_token_taken_while_a_change_is_made_is_not_the_one_after_it(registry: Registry) -> None:
    """Readers look between any two operations of a writer; none may keep a token that outlives what it saw."""
    first, second = _publish(registry, "one", alias="prod"), _publish(registry, "two")
    reader = Registry(registry.root, read_only=True)
    looks: list[tuple[object, str]] = []

    class Watched(Filesystem):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            looks.append((reader.change_token(), reader.resolve("prod").revision))

    writer = Registry(registry.root, filesystem=Watched())
    for revision in (second.revision, first.revision) * 10:
        writer.set_alias("prod", revision)
    meaning: dict[object, str] = {}
    for token, revision in looks:
        assert meaning.setdefault(token, revision) == revision
    assert len(looks) == 60


class _Full(Filesystem):
    """No byte can be written, and everything that needs none works; ``after_each`` is called after each of those."""

    def __init__(self, error: int, after_each: Callable[[], None] = lambda: None) -> None:
        self._error = error
        self._after_each = after_each

    def write_file(self, path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(self._error, os.strerror(self._error))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._after_each()

    def remove_file(self, path: Path) -> None:
        super().remove_file(path)
        self._after_each()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_what_is_removed_on_a_full_disk_is_gone_and_seen_by_who_looked_at_any_moment(
    registry: Registry, error: int
) -> None:
    """No generation can be written, neither before a change nor after it."""
    revisions = [_publish(registry, content, alias=f"alias-{content}").revision for content in ("one", "two", "three")]
    spare = _publish(registry, "spare").revision
    reader = Registry(registry.root, read_only=True)
    meaning: dict[object, object] = {}
    looks: list[object] = []

    def look() -> None:
        token = reader.change_token()
        seen = (reader.artifacts(), [alias.revision for alias in reader.aliases()])
        looks.append(token)
        assert meaning.setdefault(token, seen) == seen

    full = Registry(registry.root, filesystem=_Full(error, after_each=look))
    look()
    for content in ("one", "two", "three"):
        full.remove_alias(f"alias-{content}")
        look()
    full.remove(spare)
    look()
    with pytest.raises(StorageError):
        full.set_alias("prod", revisions[0])
    look()
    assert len(full.gc(keep_unaliased=1, min_age_seconds=-10).removed_revisions) == 2
    look()
    assert len(reader.artifacts()) == 1
    assert len(looks) > 20
    kept = reader.artifacts()[0].revision
    registry.set_alias("prod", kept)
    token = reader.change_token()
    assert token not in meaning, "a change with room again is told from all those without"


class _NoGeneration(Filesystem):
    """The disk is full whenever a generation is to be written, and has room again for everything else."""

    def write_file(self, path: Path, data: bytes) -> None:
        if data.startswith((b"changing", b"settled")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write_file(path, data)

    def fsync(self, path: Path) -> None:
        """As fast as any disk may be."""

    def fsync_dir(self, path: Path) -> None: ...


def test_without_any_generation_fast_changes_are_told_apart_by_their_times(registry: Registry) -> None:
    first, second = _publish(registry, "one"), _publish(registry, "two")
    writer = Registry(registry.root, filesystem=_NoGeneration())
    tokens = []
    for index in range(20):
        writer.set_alias("prod", (first, second)[index % 2].revision)
        tokens.append(registry.change_token())
    assert len(set(tokens)) == len(tokens)


def test_a_writer_of_an_older_version_is_followed_too(registry: Registry) -> None:
    """It replaced the generation by bare random text before its change, and did nothing after."""
    artifact = _publish(registry, "one", alias="prod")
    (registry.root / "generation").write_text("5f0c" * 8)
    tokens = [registry.change_token()]
    alias = registry.root / "aliases" / "prod.json"
    replacement = alias.with_name("copy")
    replacement.write_bytes(alias.read_bytes())
    replacement.rename(alias)
    tokens.append(registry.change_token())
    artifact.path.rename(registry.root / "trash" / "x")
    tokens.append(registry.change_token())
    assert len(set(tokens)) == 3


def test_a_thorough_token_shows_what_was_done_by_hand(registry: Registry) -> None:
    artifact = _publish(registry, "one")
    token = registry.change_token(thorough=True)
    artifact.path.rename(registry.root / "trash" / "x")
    assert registry.change_token(thorough=True) != token


def test_the_change_token_costs_the_same_with_a_thousand_names_as_with_ten(tmp_path: Path) -> None:
    best: dict[int, float] = {}
    for num_names in (10, 1000):
        registry = Registry(tmp_path / str(num_names))
        artifact = _publish(registry, "one", alias="prod")
        for index in range(num_names):
            (registry.root / "artifacts" / f"name-{index}" / f"{index:064x}").mkdir(parents=True)
            (registry.root / "aliases" / f"name-{index}.json").write_text("{}")
        registry.set_alias("beta", artifact.revision)
        times = []
        for _ in range(200):
            started = time.perf_counter()
            registry.change_token()
            times.append(time.perf_counter() - started)
        best[num_names] = min(times)
    assert best[1000] < 3 * best[10], best
