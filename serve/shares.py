"""What owners of models let other tenants use, as serving asks for it. Who keeps it, ``capo`` knows."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class Shares(Protocol):
    async def is_shared_with(self, model: str, tenant: str) -> bool:
        """Whether the owner of ``model`` lets ``tenant`` use it."""

    async def shared_with(self, tenant: str) -> Collection[str]:
        """Every name that an owner lets ``tenant`` use; some may mean nothing any more."""
