"""The one folder from which clients may have adapters imported, and nothing outside of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from registry import errors

_PARAM = "lora_path"


class ImportFolder:
    """``root`` is the operator's; links on the way to it are followed, links below it never."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @contextmanager
    def open(self, path: str) -> Iterator[Path]:
        """The directory that ``path`` (below the folder: relative, or absolute and beginning with it) names, as a path
        that goes on meaning this very directory whoever renames or links what is above it.

        Raises:
            InvalidRequestError: the path leads out of the folder, or goes through something that is no directory.
            NotFoundError: there is no such directory.
            StorageError: it cannot be read.
        """
        descriptor = self._open(self._parts(path))
        try:
            # Linux: a link of the kernel's own to the open directory.
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)

    def _parts(self, path: str) -> tuple[str, ...]:
        given = PurePosixPath(path)
        if "\0" not in path and ".." not in given.parts:
            roots = (self.root, Path(os.path.realpath(self.root))) if given.is_absolute() else (PurePosixPath(),)
            for root in roots:
                if given.is_relative_to(root) and (parts := given.relative_to(root).parts):
                    return parts
        raise errors.InvalidRequestError(
            f"The path {path[:200]!r} does not name a directory below the import folder of this service. Put the "
            "adapter there, and give its path in it.",
            code="path_not_allowed",
            param=_PARAM,
        )

    def _open(self, parts: tuple[str, ...]) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            descriptor = os.open(self.root, flags)
        except OSError as error:
            raise errors.StorageError(
                "The import folder of this service cannot be read. Make it, or correct the setting import_dir.",
                code="import_folder_unreadable",
            ) from error
        for part in parts:
            try:
                below = os.open(part, flags | os.O_NOFOLLOW, dir_fd=descriptor)
            except (OSError, ValueError) as error:
                raise _refusal("/".join(parts), error) from error
            finally:
                os.close(descriptor)
            descriptor = below
        return descriptor


def _refusal(path: str, error: OSError | ValueError) -> errors.CapoError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT:
        return errors.NotFoundError(
            f"There is no {path[:200]!r} in the import folder.", code="adapter_not_found", param=_PARAM
        )
    if number in (errno.EACCES, errno.EIO):
        return errors.StorageError(f"{path[:200]!r} in the import folder cannot be read.")
    return errors.InvalidRequestError(
        f"{path[:200]!r} is no plain directory in the import folder; links are not followed. Copy the adapter there.",
        code="path_not_allowed",
        param=_PARAM,
    )
