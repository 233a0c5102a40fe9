"""The refusal of a change where the registry is mounted read-only: a replica follows names, it does not change them."""

from __future__ import annotations

from registry import Registry, errors


def require_writable(registry: Registry, action: str) -> None:
    """Raises:
    PermissionDeniedError: ``registry`` is read-only in this process.
    """
    if registry.read_only:
        raise errors.PermissionDeniedError(
            f"This replica has the registry read-only and cannot {action}. Send the request to the control service "
            "(capo serve --role control); replicas follow within a second.",
            code="registry_is_read_only",
        )
