"""What the gRPC server must know of a service in order to look after its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import grpc


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """A service of another room, which this one may not import: ``capo`` passes it in."""

    full_name: str
    """As in its proto: ``capo.v1.Tuning``."""
    add_to: Callable[[grpc.aio.Server], None]
