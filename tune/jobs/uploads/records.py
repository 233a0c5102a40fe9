"""What is kept of an upload and of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

UploadStatus = Literal["pending", "completed", "cancelled", "expired"]


@dataclass(frozen=True, slots=True)
class UploadRecord:
    id: str
    tenant: str
    filename: str
    purpose: str
    size_bytes: int
    """Of the whole file, as the client announced it."""
    file_expires_after_seconds: int | None
    status: UploadStatus
    part_ids: Sequence[str] | None
    """In the order of the file; of a completed upload only."""
    file_id: str | None
    created_at: int
    expires_at: int
    """From then on a pending upload takes no part, and its parts are removed."""


@dataclass(frozen=True, slots=True)
class PartRecord:
    id: str
    upload_id: str
    size_bytes: int
    created_at: int
