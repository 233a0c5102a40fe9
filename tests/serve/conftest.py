"""What adapters are checked against: a small base, and a registry of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry import BaseModel, Registry, locate_base_model
from tests.registry.samples import write_base


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return locate_base_model(str(write_base(tmp_path / "base")))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")
