"""The audit log: one line of JSON for each admin act, in a file that is only ever appended to.

A line says who did what to what, from where, and how it ended. It holds names and revisions, and never a key's secret
or anybody's text. The file is ``audit.jsonl`` in the data directory, readable by its owner alone; rotating it is the
operator's business (it is opened anew for each line, so renaming it is enough). Where a process has no disk that
outlives it, the lines go to its standard output, for a log collector.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.jsonl"
_STDOUT = 1


@dataclass(frozen=True, slots=True)
class Act:
    key_id: str | None
    """``None``: no key had to be shown, or none was good."""
    tenant: str | None
    operation: str
    target: str
    peer: str
    result: str
    request_id: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


class AuditPlace(StrEnum):
    FILE = "file"
    STDOUT = "stdout"


class AuditLog:
    """Safe for several processes: each line is one write to a file that is open for appending."""

    def __init__(self, data_dir: Path, place: AuditPlace = AuditPlace.FILE) -> None:
        self._path = data_dir / AUDIT_FILE
        self._place = place

    def write(self, act: Act) -> None:
        """Append one line. A disk that refuses is a warning: the act has happened already."""
        line = {
            "at": round(time.time(), 3),
            "key": act.key_id,
            "tenant": act.tenant,
            "operation": act.operation,
            "target": act.target,
            "from": act.peer,
            "result": act.result,
            "request_id": act.request_id,
            **({"changes": dict(act.notes)} if act.notes else {}),
        }
        data = (json.dumps(line) + "\n").encode()
        try:
            if self._place is AuditPlace.STDOUT:
                os.write(_STDOUT, data)
            else:
                self._append(data)
        except OSError as error:
            logger.warning("the audit log cannot be written: %s; the line is %s", error.strerror, data.decode().strip())

    def _append(self, data: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
