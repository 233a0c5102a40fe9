"""Acts of the command line in the audit log: who runs it is known to the operating system alone."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capo.audit import Act, AuditLog
from registry import errors


@contextmanager
def audited(data_dir: Path, operation: str, target: str) -> Iterator[dict[str, str]]:
    """Writes one line when the block ends, however it does. The block fills in what the line says beside that."""
    notes: dict[str, str] = {}
    result = "ok"
    try:
        yield notes
    except errors.CapoError as error:
        result = error.code
        raise
    except BaseException:
        result = "internal_error"
        raise
    finally:
        act = Act(
            key_id=None,
            tenant=None,
            operation=operation,
            target=target,
            peer=f"command line of {_user()}",
            result=result,
            notes=notes,
        )
        AuditLog(data_dir).write(act)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())  # a container may run as a number that has no name
