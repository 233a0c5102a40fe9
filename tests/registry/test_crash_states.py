"""Power cuts: every state of the disk that a crash may leave shows a reader whole artifacts and a valid alias."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry import CanaryRequest, Registry
from registry.errors import ModelNotFoundError, NotFoundError
from tests.registry.crash import CrashModel, RecordingFilesystem, State, write_state
from tests.registry.samples import draft, tree, write_files
from tests.sizes import size


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Memory-backed where there is such a place: thousands of small trees are written."""
    shared_memory = Path("/dev/shm")
    parent = shared_memory if shared_memory.is_dir() else Path("/tmp")
    directory = parent / f"capo-crash-{time.time_ns()}"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def _registry(root: Path, filesystem: RecordingFilesystem | None = None, *, now: int = 1000) -> Registry:
    return Registry(root, filesystem=filesystem, clock=lambda: float(now))


def _crash_states(
    scratch: Path, recorder: RecordingFilesystem, before: dict[str, bytes | None], *, per_op: int
) -> Iterator[tuple[State, list[str]]]:
    """Every distinct state after every prefix of the log, with what had been acknowledged by then."""
    model = CrashModel(before)
    rng = random.Random(7)
    seen: set[tuple[State, int]] = set()
    for op in [None, *recorder.log]:
        if op is not None:
            model.step(op)
        for state in model.states(rng, limit=per_op):
            key = (state, len(model.acknowledged))
            if key not in seen:
                seen.add(key)
                yield state, list(model.acknowledged)


def _read(root: Path) -> tuple[set[str], str | None]:
    """What a reader sees: revisions, all of which must be whole, and where the alias points."""
    reader = Registry(root, read_only=True)
    revisions: set[str] = set()
    for artifact in reader.artifacts():
        assert reader.verify(artifact.revision) == []
        revisions.add(artifact.revision)
    for alias in reader.aliases():
        assert alias.revision in revisions, f"alias {alias.alias} points to nothing"
        assert alias.canary is None or alias.canary.revision in revisions, f"the canary of {alias.alias} is nothing"
    try:
        return revisions, reader.resolve("support").revision
    except ModelNotFoundError:
        return revisions, None


def _check_all(
    scratch: Path,
    recorder: RecordingFilesystem,
    before: dict[str, bytes | None],
    check: Callable[[Path, list[str]], None],
    *,
    per_op: int,
) -> int:
    count = 0
    for count, (state, acknowledged) in enumerate(_crash_states(scratch, recorder, before, per_op=per_op), start=1):
        root = scratch / f"state-{count}"
        write_state(state, root)
        check(root, acknowledged)
        shutil.rmtree(root)
    return count


class _PublishAndFlip:
    """v1 is published and aliased; v2 is published over it, then the alias goes back and forth."""

    def __init__(self, scratch: Path, recorder_type: type[RecordingFilesystem] = RecordingFilesystem) -> None:
        root = scratch / "registry"
        registry = _registry(root)
        self.v1 = registry.publish(write_files(scratch / "one", b"one"), draft(), alias="support").revision
        self.before = tree(root)
        self.recorder = recorder_type(root)
        recorded = _registry(root, self.recorder, now=2000)
        self.v2 = recorded.publish(
            write_files(scratch / "two", b"two", num_files=5),
            draft(),
            alias="support",
            fine_tuned_name="ft:tiny:acme::a1",
        ).revision
        self.recorder.acknowledge("published")
        recorded.rollback_alias("support")
        self.recorder.acknowledge("rolled back")
        recorded.set_alias("support", self.v2, expected=self.v1)
        self.recorder.acknowledge("set")

    def check(self, root: Path, acknowledged: list[str]) -> None:
        revisions, alias = _read(root)
        assert self.v1 in revisions
        assert revisions <= {self.v1, self.v2}
        allowed = {
            (): {self.v1, self.v2},
            ("published",): {self.v2, self.v1},  # being rolled back
            ("published", "rolled back"): {self.v1, self.v2},  # being set
            ("published", "rolled back", "set"): {self.v2},
        }[tuple(acknowledged)]
        assert alias in allowed
        if acknowledged:
            assert self.v2 in revisions
            assert Registry(root, read_only=True).resolve("ft:tiny:acme::a1").revision == self.v2


def test_a_reader_of_any_crash_state_sees_whole_revisions_and_the_old_or_the_new_alias(scratch: Path) -> None:
    run = _PublishAndFlip(scratch)
    started = time.process_time()
    count = _check_all(scratch, run.recorder, run.before, run.check, per_op=size(100, 250))
    assert count >= size(900, 2000), count
    assert time.process_time() - started < 30


def test_a_crashed_registry_collects_its_garbage_and_publishes_again(scratch: Path) -> None:
    run = _PublishAndFlip(scratch)
    again = write_files(scratch / "three", b"two", num_files=5)

    def recover(root: Path, acknowledged: list[str]) -> None:
        registry = _registry(root, now=3000)
        registry.gc()
        assert list((root / "staging").iterdir()) == []
        assert registry.publish(again, draft(), alias="support").revision == registry.resolve("support").revision
        revisions, _ = _read(root)
        assert len(revisions) == 2, "the repeated publish of v2 made a third revision"

    assert _check_all(scratch, run.recorder, run.before, recover, per_op=2) >= 100


def test_a_crash_while_the_registry_is_made_leaves_none_or_a_working_one(scratch: Path) -> None:
    root = scratch / "registry"
    root.mkdir()
    recorder = RecordingFilesystem(root)
    registry = _registry(root, recorder)
    recorder.acknowledge("made")
    artifact = registry.publish(write_files(scratch / "one", b"one"), draft(), alias="support")
    recorder.acknowledge("published")

    def check(state: Path, acknowledged: list[str]) -> None:
        try:
            revisions, alias = _read(state)
        except NotFoundError:
            assert not acknowledged
            _registry(state)
            return
        assert revisions <= {artifact.revision}
        assert alias in (None, artifact.revision)
        if "published" in acknowledged:
            assert alias == artifact.revision

    assert _check_all(scratch, recorder, {}, check, per_op=100) >= 300


def test_a_crash_while_an_artifact_is_removed_leaves_it_whole_or_gone(scratch: Path) -> None:
    root = scratch / "registry"
    registry = _registry(root)
    kept = registry.publish(write_files(scratch / "one", b"one"), draft(), alias="support")
    doomed = registry.publish(write_files(scratch / "two", b"two"), draft(), alias="beta")
    before = tree(root)
    recorder = RecordingFilesystem(root)
    _registry(root, recorder).remove(doomed.revision, force=True)
    recorder.acknowledge("removed")
    _registry(root, recorder, now=10**6).gc(keep_unaliased=0)

    def check(state: Path, acknowledged: list[str]) -> None:
        revisions, alias = _read(state)
        assert alias == kept.revision
        assert revisions in ({kept.revision}, {kept.revision, doomed.revision})
        if acknowledged:
            assert revisions == {kept.revision}

    assert _check_all(scratch, recorder, before, check, per_op=32) >= 100


def test_a_crash_after_gc_took_a_names_directory_leaves_what_was_published_there_since(scratch: Path) -> None:
    root = scratch / "registry"
    registry = _registry(root)
    kept = registry.publish(write_files(scratch / "one", b"one"), draft(), alias="support")
    registry.remove(registry.publish(write_files(scratch / "two", b"two"), draft("other")).revision)
    before = tree(root)
    recorder = RecordingFilesystem(root)
    _registry(root, recorder).gc()
    assert not (root / "artifacts" / "other").exists()
    new = _registry(root, recorder).publish(write_files(scratch / "three", b"three"), draft("other"))
    recorder.acknowledge("published")

    def check(state: Path, acknowledged: list[str]) -> None:
        revisions, _ = _read(state)
        assert {kept.revision} <= revisions <= {kept.revision, new.revision}
        if acknowledged:
            assert new.revision in revisions

    assert _check_all(scratch, recorder, before, check, per_op=32) >= 100


class _RunCanaries:
    """An alias gets a canary, a larger share of it, loses it by a rollback, and gets it back to become the main."""

    def __init__(self, scratch: Path, recorder_type: type[RecordingFilesystem] = RecordingFilesystem) -> None:
        root = scratch / "registry"
        registry = _registry(root)
        v1 = registry.publish(write_files(scratch / "one", b"one"), draft(), alias="support").revision
        v2 = registry.publish(write_files(scratch / "two", b"two"), draft()).revision
        self.before = tree(root)
        self.recorder = recorder_type(root)
        recorded = _registry(root, self.recorder, now=2000)
        self.steps: list[tuple[str, tuple[str, int] | None]] = [(v1, None)]
        for percent in (10, 50):
            recorded.set_alias("support", v1, canary=CanaryRequest(v2, percent))
            self._done((v1, (v2, percent)))
        recorded.rollback_alias("support")
        self._done((v1, None))
        recorded.set_alias("support", v1, canary=CanaryRequest(v2, 99))
        self._done((v1, (v2, 99)))
        recorded.set_alias("support", v2)
        self._done((v2, None))
        recorded.set_alias("support", v2, canary=CanaryRequest(v1, 1))
        self._done((v2, (v1, 1)))
        recorded.remove(v1, force=True)
        self._done((v2, None))

    def _done(self, state: tuple[str, tuple[str, int] | None]) -> None:
        self.steps.append(state)
        self.recorder.acknowledge(f"step {len(self.steps)}")

    def check(self, root: Path, acknowledged: list[str]) -> None:
        _read(root)
        (alias,) = Registry(root, read_only=True).aliases()
        seen = alias.revision, None if alias.canary is None else (alias.canary.revision, alias.canary.percent)
        assert seen in self.steps[len(acknowledged) : len(acknowledged) + 2], "neither the old state nor the next"


def test_a_reader_of_any_crash_state_sees_the_old_split_or_the_new_one(scratch: Path) -> None:
    run = _RunCanaries(scratch)
    assert _check_all(scratch, run.recorder, run.before, run.check, per_op=size(40, 100)) >= size(150, 300)


class _NoFileFsync(RecordingFilesystem):
    def fsync(self, path: Path) -> None:
        pass


class _NoDirectoryFsync(RecordingFilesystem):
    def fsync_dir(self, path: Path) -> None:
        pass


class _NoFsyncOfArtifacts(RecordingFilesystem):
    """Forgets exactly one: the directory of names."""

    def fsync_dir(self, path: Path) -> None:
        if path.name != "artifacts":
            super().fsync_dir(path)


@pytest.mark.parametrize("run_type", [_PublishAndFlip, _RunCanaries])
@pytest.mark.parametrize("recorder_type", [_NoFileFsync, _NoDirectoryFsync])
def test_the_enumeration_notices_a_writer_that_does_not_fsync(
    scratch: Path, run_type: type[_PublishAndFlip | _RunCanaries], recorder_type: type[RecordingFilesystem]
) -> None:
    run = run_type(scratch, recorder_type)
    with pytest.raises((AssertionError, ModelNotFoundError, ValueError)):
        _check_all(scratch, run.recorder, run.before, run.check, per_op=81)


def test_the_enumeration_notices_a_single_forgotten_fsync(scratch: Path) -> None:
    root = scratch / "registry"
    _registry(root)
    before = tree(root)
    recorder = _NoFsyncOfArtifacts(root)
    artifact = _registry(root, recorder).publish(write_files(scratch / "one", b"one"), draft(), alias="support")
    recorder.acknowledge("published")

    def check(state: Path, acknowledged: list[str]) -> None:
        _, alias = _read(state)
        if acknowledged:
            assert alias == artifact.revision

    with pytest.raises(AssertionError):
        _check_all(scratch, recorder, before, check, per_op=32)
