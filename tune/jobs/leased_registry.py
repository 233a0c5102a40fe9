"""The registry as a training process sees it, which publishes only while its job is its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from registry import Artifact, ManifestDraft, Registry
from registry.principal import Principal


class LeasedRegistry(Registry):
    """Calls ``check_lease`` before each publication; what that raises is raised instead of publishing.

    So a worker that was cut off for longer than its lease, and comes back with a finished model, leaves nothing.
    ``principal`` is whose job it is: the model becomes its own. Whether it may start from somebody else's model was
    decided when the job was made, so reading sees everything.
    """

    def __init__(self, root: Path, *, principal: Principal, check_lease: Callable[[], None]) -> None:
        super().__init__(root, principal=principal)
        self._everything = Registry(root)
        self._check_lease = check_lease

    def resolve(self, reference: str) -> Artifact:
        return self._everything.resolve(reference)

    def publish(
        self,
        source_dir: Path,
        draft: ManifestDraft,
        *,
        alias: str | None = None,
        fine_tuned_name: str | None = None,
    ) -> Artifact:
        self._check_lease()
        return super().publish(source_dir, draft, alias=alias, fine_tuned_name=fine_tuned_name)
