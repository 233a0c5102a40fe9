"""Caches of compiled code belong to the service alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from capo.caches import refuse_shared_caches
from registry import errors


@pytest.mark.parametrize("variable", ["VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_cache_that_others_may_write_is_refused_at_the_start(tmp_path: Path, variable: str, mode: int) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    given = {"HOME": str(tmp_path), variable: str(cache)}
    cache.chmod(0o755)
    refuse_shared_caches(given)
    cache.chmod(mode)
    with pytest.raises(errors.PermissionDeniedError, match="run as code"):
        refuse_shared_caches(given)


def test_the_libraries_own_places_count_and_what_is_not_there_yet_does_not(tmp_path: Path) -> None:
    given = {"HOME": str(tmp_path)}
    refuse_shared_caches(given)
    cache = tmp_path / ".cache" / "vllm"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(errors.PermissionDeniedError):
        refuse_shared_caches(given)
