"""Disks that are full, failing or read-only: an error with advice, nothing half-done, and service for readers."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from registry import Filesystem, Registry
from registry.durable import HeldLock
from registry.errors import InvalidArtifactError, ModelNotFoundError, StorageError, UnavailableError
from tests.registry.samples import draft, tree, write_files


class FailingFilesystem(Filesystem):
    """Fails the n-th writing operation, counted from 1; ``for_ever`` also every later one that needs space."""

    def __init__(self, fail_at: int, error: int, *, for_ever: bool = False) -> None:
        self._fail_at = fail_at
        self._error = error
        self._for_ever = for_ever
        self.num_calls = 0
        self.failed_call = ""

    def mkdir(self, path: Path) -> None:
        self._count(f"mkdir {path.name}", needs_space=True)
        super().mkdir(path)

    def write_file(self, path: Path, data: bytes) -> None:
        try:
            self._count(f"write_file {path.name}", needs_space=True)
        except OSError:
            super().write_file(path, data[: len(data) // 2])
            raise
        super().write_file(path, data)

    def copy_file(self, source: Path, target: Path) -> None:
        try:
            self._count(f"copy_file {target.name}", needs_space=True)
        except OSError:
            super().write_file(target, b"half")
            raise
        super().copy_file(source, target)

    def fsync(self, path: Path) -> None:
        self._count(f"fsync {path.name}")
        super().fsync(path)

    def fsync_dir(self, path: Path) -> None:
        self._count(f"fsync_dir {path.name}")
        super().fsync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._count(f"rename to {target.name}")
        super().rename(source, target)

    def _count(self, call: str, *, needs_space: bool = False) -> None:
        self.num_calls += 1
        if self.num_calls == self._fail_at or (self._for_ever and needs_space and self.num_calls > self._fail_at):
            self.failed_call = self.failed_call or call
            raise OSError(self._error, os.strerror(self._error))


def _failures(tmp_path: Path, error: int, *, for_ever: bool) -> Iterator[tuple[Path, FailingFilesystem]]:
    """A registry with v1, and a file system that fails at the first, the second, ... operation of the next call."""
    fail_at = 0
    while True:
        fail_at += 1
        place = tmp_path / str(fail_at)
        Registry(place / "registry").publish(write_files(place / "one", b"one"), draft(), alias="support")
        filesystem = FailingFilesystem(fail_at, error, for_ever=for_ever)
        yield place, filesystem
        if filesystem.num_calls < fail_at:
            assert fail_at > 10, "too few operations to prove anything"
            return


def _publish_or_refusal(registry: Registry, source: Path) -> StorageError | None:
    try:
        registry.publish(source, draft(), alias="support", fine_tuned_name="ft:tiny:acme::a1")
    except StorageError as refusal:
        return refusal
    return None


@pytest.mark.parametrize(
    ("error", "for_ever", "advice", "harmless"),
    [
        (errno.ENOSPC, False, "free space", 4),
        (errno.ENOSPC, True, "free space", 2),
        (errno.EIO, False, "check it", 2),
        (errno.EDQUOT, True, "quota", 2),
    ],
)
def test_a_publish_that_fails_anywhere_leaves_the_old_state_and_can_be_repeated(
    tmp_path: Path, error: int, for_ever: bool, advice: str, harmless: int
) -> None:
    """Only a generation may fail in silence, being written or renamed: the one that settles a change, and on a full
    disk also the one that announces it, which is taken away instead."""
    unnoticed = 0
    for place, filesystem in _failures(tmp_path, error, for_ever=for_ever):
        root = place / "registry"
        old = Registry(root).resolve("support")
        source = write_files(place / "two", b"two")
        refusal = _publish_or_refusal(Registry(root, filesystem=filesystem), source)
        if refusal is None:
            unnoticed += filesystem.failed_call != ""
            reader = Registry(root, read_only=True)
            assert reader.resolve("support") == reader.resolve("ft:tiny:acme::a1") != old
        else:
            assert filesystem.failed_call
            assert advice in refusal.message
            assert str(tmp_path) not in refusal.message
            assert isinstance(refusal.__cause__, OSError)
            reader = Registry(root, read_only=True)
            assert old in reader.artifacts()
            assert all(reader.verify(artifact.revision) == [] for artifact in reader.artifacts())
            # The alias is flipped before the ft: name is set; when only that fails, the flip stands.
            assert reader.resolve("support") in {old, *reader.artifacts()}
            with pytest.raises(ModelNotFoundError):
                reader.resolve("ft:tiny:acme::a1")
            assert list((root / "staging").iterdir()) == []
            assert not list(root.rglob(".tmp-*"))
        healthy = Registry(root)
        new = healthy.publish(source, draft(), alias="support", fine_tuned_name="ft:tiny:acme::a1")
        assert healthy.resolve("support") == healthy.resolve("ft:tiny:acme::a1") == new
        assert healthy.verify("support") == []
    assert unnoticed == harmless


def test_an_alias_that_fails_to_flip_still_points_to_the_old_revision(tmp_path: Path) -> None:
    fail_at = 0
    registry = Registry(tmp_path / "registry")
    old = registry.publish(write_files(tmp_path / "one", b"one"), draft(), alias="support")
    new = registry.publish(write_files(tmp_path / "two", b"two"), draft())
    while True:
        fail_at += 1
        filesystem = FailingFilesystem(fail_at, errno.EIO)
        failing = Registry(registry.root, filesystem=filesystem)
        if filesystem.num_calls:
            pytest.fail("opening a registry wrote something")
        try:
            failing.set_alias("support", new.revision)
            break
        except StorageError:
            assert registry.resolve("support") == old
            assert not list(registry.root.rglob(".tmp-*"))
    assert fail_at > 5
    assert registry.resolve("support") == new


def test_an_artifact_whose_last_fsync_fails_is_not_published(tmp_path: Path) -> None:
    class LastFsyncFails(Filesystem):
        calls = 0

        def fsync_dir(self, path: Path) -> None:
            if path.name == "support":
                LastFsyncFails.calls += 1
                raise OSError(errno.EIO, "made up")
            super().fsync_dir(path)

    registry = Registry(tmp_path / "registry", filesystem=LastFsyncFails())
    with pytest.raises(StorageError):
        registry.publish(write_files(tmp_path / "one", b"one"), draft(), alias="support")
    assert LastFsyncFails.calls == 1, "a failed fsync is final"
    assert registry.artifacts() == []
    assert registry.aliases() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


def test_a_disk_that_is_really_full_refuses_the_publish_and_serves_readers(small_disk: Path, tmp_path: Path) -> None:
    registry = Registry(small_disk / "registry")
    old = registry.publish(write_files(tmp_path / "one", b"x" * 100_000), draft(), alias="support")
    free_before = os.statvfs(small_disk).f_bavail
    with pytest.raises(StorageError, match="disk is full"):
        registry.publish(write_files(tmp_path / "big", b"y" * 500_000), draft(), alias="support")
    assert os.statvfs(small_disk).f_bavail >= free_before - 2, "the failed publish kept space"
    assert registry.resolve("support") == old
    assert registry.verify("support") == []
    new = registry.publish(write_files(tmp_path / "small", b"z"), draft(), alias="support")
    assert registry.resolve("support") == new


def test_what_frees_space_works_on_a_disk_that_is_really_full(small_disk: Path, tmp_path: Path) -> None:
    registry = Registry(small_disk / "registry")
    revisions = [
        registry.publish(write_files(tmp_path / content, content.encode() * 50_000), draft(), alias="support").revision
        for content in ("a", "b", "c", "d")
    ]
    reader = Registry(registry.root, read_only=True)
    changes = [
        lambda: registry.remove_alias("support"),
        lambda: registry.remove(revisions[3]),
        lambda: registry.gc(keep_unaliased=1, min_age_seconds=-10),
        lambda: registry.gc(keep_unaliased=0, min_age_seconds=-10),
    ]
    for index, change in enumerate(changes):
        token = reader.change_token()
        _fill_up(small_disk / f"full-{index}")
        change()
        assert reader.change_token() != token
    assert (reader.artifacts(), reader.aliases()) == ([], [])
    assert os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize > 50_000


def _fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"0" * 4096)


def test_a_registry_on_a_read_only_mount_serves_readers(small_disk: Path, tmp_path: Path) -> None:
    artifact = Registry(small_disk / "registry").publish(
        write_files(tmp_path / "one", b"one"), draft(), alias="support"
    )
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    reader = Registry(small_disk / "registry", read_only=True)
    assert reader.resolve("support") == artifact
    assert reader.verify("support") == []
    with pytest.raises(StorageError, match="read-only"):
        Registry(small_disk / "registry").set_alias("beta", artifact.revision)


def test_a_disk_that_cannot_be_read_is_an_error_and_never_an_empty_list(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish(write_files(tmp_path / "one", b"one"), draft(), alias="support")
    for name in ("artifacts", "aliases"):
        (registry.root / name).rename(tmp_path / name)
    for call in (registry.artifacts, registry.aliases, registry.change_token):
        with pytest.raises(StorageError):
            call()


class NoWrites(Filesystem):
    """Fails the test if anything is written."""

    def _refuse(self) -> None:
        raise AssertionError("a read-only registry wrote")

    def mkdir(self, path: Path) -> None:
        self._refuse()

    def write_file(self, path: Path, data: bytes) -> None:
        self._refuse()

    def rename(self, source: Path, target: Path) -> None:
        self._refuse()

    def remove_file(self, path: Path) -> None:
        self._refuse()

    def remove_tree(self, path: Path) -> None:
        self._refuse()

    def remove_empty_dir(self, path: Path) -> None:
        self._refuse()

    def lock(self, path: Path, *, wait_seconds: float) -> HeldLock | None:
        self._refuse()
        return None


def test_a_read_only_registry_reads_everything_and_writes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    artifact = Registry(root).publish(write_files(tmp_path / "one", b"one"), draft(), alias="support")
    before = tree(root)
    reader = Registry(root, read_only=True, filesystem=NoWrites())
    assert reader.resolve("support") == reader.artifact("support", artifact.digest) == artifact
    assert reader.artifacts() == [artifact]
    assert reader.aliases() == [reader.alias("support")]
    assert reader.verify("support") == []
    reader.change_token()
    for call in (
        lambda: reader.publish(tmp_path / "one", draft()),
        lambda: reader.import_adapter(tmp_path / "one", name="support", base_model=None),
        lambda: reader.stage(),
        lambda: reader.set_alias("support", artifact.revision),
        lambda: reader.rollback_alias("support"),
        lambda: reader.remove_alias("support"),
        lambda: reader.remove(artifact.revision),
        lambda: reader.gc(),
    ):
        with pytest.raises(StorageError, match="read-only"):
            call()
    assert tree(root) == before


def test_a_lock_that_is_never_released_ends_in_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "registry")
    artifact = registry.publish(write_files(tmp_path / "one", b"one"), draft())
    held = Filesystem().lock(registry.root / "registry.lock", wait_seconds=0)
    assert held is not None
    monkeypatch.setattr("registry.changes.LOCK_WAIT_SECONDS", 0.05)
    with pytest.raises(UnavailableError, match="another process"):
        registry.set_alias("support", artifact.revision)
    held.release()
    registry.set_alias("support", artifact.revision)


@pytest.mark.parametrize("kind", ["link", "directory link", "hard link", "fifo", "pickle", "code", "manifest", "empty"])
def test_a_directory_with_anything_but_plain_files_is_refused_without_hanging(tmp_path: Path, kind: str) -> None:
    source = write_files(tmp_path / "one", b"one")
    secret = tmp_path / "secret"
    secret.write_text("host file")
    match kind:
        case "link":
            (source / "x.json").symlink_to(secret)
        case "directory link":
            (source / "x").symlink_to(tmp_path)
        case "hard link":
            (source / "x.json").hardlink_to(secret)
        case "fifo":
            os.mkfifo(source / "x.json")
        case "pickle":
            (source / "pytorch_model.BIN").write_bytes(b"")
        case "code":
            (source / "modeling.py").write_text("")
        case "manifest":
            (source / "manifest.json").write_text("{}")
        case _:
            source = tmp_path / "nothing"
            source.mkdir()
    registry = Registry(tmp_path / "registry")
    with pytest.raises(InvalidArtifactError) as caught:
        registry.publish(source, draft())
    assert (
        caught.value.code
        in {
            "link": "links_not_allowed",
            "directory link": "links_not_allowed",
            "hard link": "links_not_allowed",
            "fifo": "special_file_not_allowed",
            "pickle": "pickle_not_allowed",
            "code": "code_not_allowed",
            "manifest": "manifest_not_allowed",
            "empty": "no_files",
        }[kind]
    )
    assert registry.artifacts() == []
    assert list((registry.root / "staging").iterdir()) == []
