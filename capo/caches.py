"""Directories that the engine's libraries keep compiled code in: what lies there is run, so nobody else may write it.

vLLM says so of its own (docs/usage/security.md, "Cache Directory Security").
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from registry import errors


def cache_directories(environment: dict[str, str] | None = None) -> Iterator[Path]:
    """Where vLLM, torch and Triton keep compiled code, by their own rules."""
    given = os.environ if environment is None else environment
    home = Path(given.get("HOME") or "~").expanduser()
    cache = Path(given.get("XDG_CACHE_HOME") or home / ".cache")
    yield Path(given.get("VLLM_CACHE_ROOT") or cache / "vllm")
    yield Path(given.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    if inductor := given.get("TORCHINDUCTOR_CACHE_DIR"):
        yield Path(inductor)


def refuse_shared_caches(environment: dict[str, str] | None = None) -> None:
    """Raises:
    PermissionDeniedError: other users may write into one of them.
    """
    for path in cache_directories(environment):
        try:
            status = path.stat()
        except OSError:
            continue  # made later, by the library, for this user
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (os.getuid(), 0):
            raise errors.PermissionDeniedError(
                f"Others may write into {path}, and what lies there is run as code. chmod go-w it, or let the service "
                "have a cache of its own (VLLM_CACHE_ROOT, TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR).",
                code="shared_cache",
            )
