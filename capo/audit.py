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
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.jsonl"
_STDOUT = 1
_MAX_WAITING_LINES = 10_000
"""Some 3 MB, or 20 of the longest. A disk that takes one line in a millisecond is never that far behind."""
_CLOSE_SECONDS = 5.0


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
        """Append one line; blocks on the disk. One that refuses is a warning: the act has happened already."""
        self.append(line_of(act))

    def append(self, line: bytes) -> None:
        """Append what :func:`line_of` made, as :meth:`write` does."""
        try:
            if self._place is AuditPlace.STDOUT:
                os.write(_STDOUT, line)
            else:
                self._append(line)
        except OSError as error:
            _warn(str(error.strerror), line)

    def _append(self, data: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)


class AuditWriter:
    """Writes to a log in a thread of its own, so that whoever acts does not wait for the disk; in the order of the
    acts. A line that cannot be written in time goes to the process's log instead, whole."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._lines: deque[bytes] = deque()
        """Not written yet; the first one stays while it is being written."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def write(self, act: Act) -> None:
        """Hand over one line; waits for nothing."""
        line = line_of(act)
        with self._changed:
            if not self._is_closed and len(self._lines) < _MAX_WAITING_LINES:
                self._lines.append(line)
                self._changed.notify()
                if self._thread is None:
                    # A disk that hangs must not keep the process from ending.
                    self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
                    self._thread.start()
                return
        _warn("it has ended" if self._is_closed else f"{_MAX_WAITING_LINES} lines wait for the disk", line)

    def close(self) -> None:
        """Returns when every line is written, or after some seconds with those that the disk still holds up in the
        log."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is None:
            return
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            for line in list(self._lines):
                _warn(f"the disk has not taken this in {_CLOSE_SECONDS:.0f} s", line)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._is_closed)
                if not self._lines:
                    return
                line = self._lines[0]
            self._log.append(line)
            with self._changed:
                self._lines.popleft()


def line_of(act: Act) -> bytes:
    """The line that says so; its time is now."""
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
    return (json.dumps(line) + "\n").encode()


def _warn(reason: str, line: bytes) -> None:
    logger.warning("the audit log cannot be written: %s; the line is %s", reason, line.decode().strip())
