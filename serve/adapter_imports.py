"""vLLM's own way to manage adapters, for people who come from there: a name and a directory, load and unload.

Here a name is an alias, and the directory is imported into the registry first, through the same checks as every other
adapter. So the files may change or go after the call, new weights under an old name are a new revision, and nothing
that the engine cached of the old ones is used for them.
"""

from __future__ import annotations

from pathlib import Path

from registry import Alias, BaseModel, Canary, Seen, check_name, errors
from registry.principal import current_principal, note_change
from serve.import_folder import ImportFolder
from serve.read_only import require_writable
from serve.service import ServingService

_PARAM = "lora_name"


class AdapterImports:
    """One service's; ``folder`` is ``None`` where importing is not enabled. ``base_model`` is what shapes must fit;
    ``None`` leaves that to the gate."""

    def __init__(self, service: ServingService, base_model: BaseModel | None, folder: ImportFolder | None) -> None:
        self._service = service
        self._registry = service.catalog.registry
        self._base_model = base_model
        self._folder = folder

    async def load(self, name: str, path: str, *, in_place: bool) -> None:
        """Import the adapter at ``path`` and point the alias ``name`` to it, loaded.

        Raises:
            PermissionDeniedError: importing is not enabled.
            InvalidRequestError: the name cannot be taken, or is taken and ``in_place`` is false; or the path is none
                of the import folder's.
            InvalidArtifactError: the adapter is refused; the name means what it meant.
            ConflictError: somebody else changed the name meanwhile; likewise.
        """
        note_change(alias=name, path=path)
        folder = self._enabled()
        self._service.require_ready()
        self._check_name(name)
        present = await self._present(name)
        if present is not None and not in_place:
            raise _already_loaded(name)
        revision = await self._service.catalog.changes.run(self._import, folder, path, name)
        try:
            await self._service.aliases.set(name, revision, seen=Seen(present))
        except errors.ConflictError as error:
            if error.code == "alias_changed" and not in_place:
                raise _already_loaded(name) from error  # by somebody else, meanwhile
            raise

    async def unload(self, name: str) -> None:
        """Remove the alias ``name``, and unload what no other alias and no pin serves, when its users are done.

        Raises:
            PermissionDeniedError: importing is not enabled.
            NotFoundError: there is no such alias.
        """
        note_change(alias=name)
        self._enabled()
        self._check_name(name)
        try:
            removed = await self._service.aliases.remove(name)
        except errors.ModelNotFoundError as error:
            raise errors.NotFoundError(
                f"The lora adapter '{name}' cannot be found.", code="not_found", param=_PARAM
            ) from error
        served_by_it: list[Alias | Canary] = [removed] if removed.canary is None else [removed, removed.canary]
        for served in served_by_it:
            in_use = any(alias.serves(served.digest) for alias in self._service.catalog.snapshot.aliases.values())
            if not in_use and not self._service.pins.covers(served.revision):
                self._service.pool.release(served.revision)

    def _import(self, folder: ImportFolder, path: str, name: str) -> str:
        registry = self._registry.on_behalf_of(current_principal())
        with folder.open(path) as directory:
            return registry.import_adapter(Path(directory), name=name, base_model=self._base_model).revision

    def _enabled(self) -> ImportFolder:
        if self._folder is None:
            raise errors.PermissionDeniedError(
                "This service imports no adapters over HTTP. Start it with --import-dir DIR (CAPO_IMPORT_DIR) to allow "
                "those below DIR, or run `capo registry import` beside it.",
                code="import_not_enabled",
            )
        require_writable(self._registry, "import or unload an adapter")
        return self._folder

    def _check_name(self, name: str) -> None:
        try:
            check_name(name, reserved={self._service.catalog.base_model})
        except errors.InvalidNameError as error:
            raise errors.InvalidNameError(error.message, code=error.code, param=_PARAM) from error

    async def _present(self, name: str) -> Alias | None:
        try:
            return await self._service.aliases.get(name)
        except errors.ModelNotFoundError:
            return None


def _already_loaded(name: str) -> errors.InvalidRequestError:
    return errors.InvalidRequestError(
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True.",
        code="already_loaded",
        param=_PARAM,
    )
