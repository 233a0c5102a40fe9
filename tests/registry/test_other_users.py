"""A service may run as another user than who changes its registry: it sees the changes, and what it may not read hides
nothing else from it."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry import Registry
from registry.errors import StorageError
from tests.registry.samples import draft, write_files

_NOBODY = 65534


@pytest.fixture
def registry() -> Iterator[Registry]:
    """In a place that every user may enter."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Registry(Path(place) / "registry")


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _without_privileges() -> Iterator[None]:
    """The superuser may read everything, so it becomes another user; for others a file's mode is enough."""
    user = os.geteuid()
    os.seteuid(user or _NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def _hidden(registry: Registry) -> list[str]:
    """What a service reads and others than the owner may not."""
    folders = [registry.root / "artifacts", registry.root / "aliases"]
    paths = [registry.root / "generation", registry.root / "registry.json", *folders]
    paths += [path for folder in folders for path in folder.rglob("*")]
    needed = {path: 0o055 if path.is_dir() else 0o044 for path in paths}
    return [str(path) for path, bits in needed.items() if stat.S_IMODE(path.stat().st_mode) & bits != bits]


def test_what_is_changed_under_a_strict_umask_can_be_read_by_every_user(registry: Registry, tmp_path: Path) -> None:
    with _umask(0o077):
        one = registry.publish(write_files(tmp_path / "one", b"one"), draft(), alias="support")
        with registry.stage() as staging:
            write_files(staging / "inner", b"two")
            two = registry.publish(staging, draft("other"), alias="prod")
        registry.set_alias("support", two.revision)
        registry.rollback_alias("support")
    assert registry.resolve("support") == one
    assert _hidden(registry) == []


def test_a_registry_made_under_a_strict_umask_is_private_by_its_root_alone(tmp_path: Path) -> None:
    with _umask(0o077):
        registry = Registry(tmp_path / "registry")
        registry.publish(write_files(tmp_path / "one", b"one"), draft(), alias="support")
    assert stat.S_IMODE(registry.root.stat().st_mode) == 0o700
    assert _hidden(registry) == []


def test_a_generation_that_may_not_be_read_hides_no_change(registry: Registry, tmp_path: Path) -> None:
    one = registry.publish(write_files(tmp_path / "one", b"one"), draft(), alias="support")
    two = registry.publish(write_files(tmp_path / "two", b"two"), draft())
    reader = Registry(registry.root, read_only=True)

    def token() -> object:
        (registry.root / "generation").chmod(0)
        with _without_privileges():
            return reader.change_token()

    before = token()
    assert token() == before
    registry.set_alias("support", two.revision)
    assert token() != before
    assert one != two


def test_an_alias_or_a_name_that_may_not_be_read_hides_no_other(registry: Registry, tmp_path: Path) -> None:
    good = registry.publish(write_files(tmp_path / "one", b"one"), draft(), alias="support")
    registry.publish(write_files(tmp_path / "two", b"two"), draft("locked"), alias="closed")
    (registry.root / "aliases" / "closed.json").chmod(0)
    (registry.root / "artifacts" / "locked").chmod(0)
    reader = Registry(registry.root, read_only=True)
    with _without_privileges():
        artifacts, damaged = reader.survey()
        aliases = reader.aliases()
        token = reader.change_token(thorough=True)
        with pytest.raises(StorageError, match="Permission denied") as refused:
            reader.resolve("closed")
    assert artifacts == [good]
    assert [(each.name, each.digest, each.error.code) for each in damaged] == [("locked", "", "unreadable")]
    assert [alias.alias for alias in aliases] == ["support"]
    assert "write" not in str(refused.value), "nothing was to be written"
    registry.set_alias("new", good.revision)
    with _without_privileges():
        assert reader.change_token(thorough=True) != token
