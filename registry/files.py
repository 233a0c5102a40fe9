"""Reading directories that somebody else filled: regular files with plain names only, opened without
following links.

A link can name a file of another user that this process may read, and a hard-linked file can change under its
digest (BentoML CVE-2026-40610); opening a FIFO hangs; pickles and Python files run code when something loads
them.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from registry.errors import InvalidArtifactError
from registry.names import shown

_PICKLE_ADVICE = "Loading it can run code. Keep weights as .safetensors only and remove this file."
FORBIDDEN_SUFFIXES = {
    ".bin": ("pickle_not_allowed", _PICKLE_ADVICE),
    ".pt": ("pickle_not_allowed", _PICKLE_ADVICE),
    ".pth": ("pickle_not_allowed", _PICKLE_ADVICE),
    ".pkl": ("pickle_not_allowed", _PICKLE_ADVICE),
    ".pickle": ("pickle_not_allowed", _PICKLE_ADVICE),
    ".ckpt": ("pickle_not_allowed", _PICKLE_ADVICE),
    ".py": ("code_not_allowed", "Artifacts hold no code. Remove this file."),
    ".pyc": ("code_not_allowed", "Artifacts hold no code. Remove this file."),
    ".so": ("code_not_allowed", "Artifacts hold no code. Remove this file."),
    ".gguf": ("unsupported_weights_format", "Convert it to .safetensors and remove this file."),
}

_MAX_FILES = 2_000
_MAX_DEPTH = 8
_PATH_PART = re.compile(r"[A-Za-z0-9_.+=@,()\[\]~ -]{1,200}", re.ASCII)
_HASH_CHUNK_BYTES = 4 << 20


def check_relative_path(text: str) -> str:
    """``text`` itself, if it may stand in a manifest: plain parts joined by ``/``, no ``.``, ``..`` or root.

    Raises:
        InvalidArtifactError: it may not.
    """
    parts = text.split("/")
    if len(parts) > _MAX_DEPTH or any(_PATH_PART.fullmatch(part) is None or part in (".", "..") for part in parts):
        raise InvalidArtifactError(
            f"The file name {shown(text)} is not allowed: up to {_MAX_DEPTH} parts of ASCII letters, digits "
            "and _.+=@,()[]~- or space. Rename the file.",
            code="invalid_file_name",
        )
    return text


def regular_files(directory: Path) -> list[str]:
    """Relative paths of all files below ``directory``, sorted. Opens nothing.

    Raises:
        InvalidArtifactError: a link, a hard link, a FIFO, socket or device, a pickle, a Python or GGUF file, a
            name that no manifest may hold, or too many files.
        OSError: the directory cannot be read.
    """
    found: list[str] = []
    pending = [(directory, "")]
    while pending:
        folder, prefix = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                relative = check_relative_path(prefix + entry.name)
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    pending.append((folder / entry.name, f"{relative}/"))
                    continue
                _check_entry(relative, status)
                found.append(relative)
                if len(found) > _MAX_FILES:
                    raise InvalidArtifactError(
                        f"The directory holds more than {_MAX_FILES} files. Give the directory of one artifact.",
                        code="too_many_files",
                    )
    return sorted(found)


def plain_files(directory: Path, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that the directory has, sorted. Opens nothing.

    Raises:
        InvalidArtifactError: one of them is what :func:`regular_files` refuses. Other entries may be anything.
        OSError: the directory cannot be read.
    """
    found: list[str] = []
    for name in sorted(names):
        try:
            status = (directory / name).lstat()
        except FileNotFoundError:
            continue
        _check_entry(name, status)
        found.append(name)
    return found


def folders_of(relative_paths: list[str]) -> list[str]:
    """All folders named by these paths, deepest first; the top itself is not among them."""
    folders = {
        "/".join(parts[:depth])
        for path in relative_paths
        for parts in [path.split("/")]
        for depth in range(1, len(parts))
    }
    return sorted(folders, key=lambda folder: (-folder.count("/"), folder))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a link, a FIFO or a device is refused, and nothing is waited for.

    Raises:
        InvalidArtifactError: it is no regular file with a single name.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise _link_refused(path.name) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _special_file_refused(path.name)
        return os.fdopen(descriptor, "rb")
    except InvalidArtifactError:
        os.close(descriptor)
        raise


def read_limited(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file of at most ``max_bytes``.

    Raises:
        InvalidArtifactError: it is larger, or no regular file.
        OSError: it cannot be read.
    """
    with open_regular(path) as source:
        data = source.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise InvalidArtifactError(
            f"{shown(path.name)} has more than the {max_bytes} bytes that are allowed.", code="file_too_large"
        )
    return data


def hash_file(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 (hex) of a regular file; blocks for the time of one read."""
    digest = hashlib.sha256()
    size_bytes = 0
    with open_regular(path) as source:
        while chunk := source.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return size_bytes, digest.hexdigest()


def _check_entry(relative: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise _link_refused(relative)
    if not stat.S_ISREG(status.st_mode):
        raise _special_file_refused(relative)
    if status.st_nlink > 1:
        raise InvalidArtifactError(
            f"{shown(relative)} has {status.st_nlink} hard links, so it can change under another name. "
            "Copy the directory without links (cp -r --no-preserve=links) and use the copy.",
            code="links_not_allowed",
        )
    refusal = FORBIDDEN_SUFFIXES.get(Path(relative).suffix.lower())
    if refusal is not None:
        code, advice = refusal
        raise InvalidArtifactError(f"{shown(relative)} is not allowed in an artifact. {advice}", code=code)


def _link_refused(name: str) -> InvalidArtifactError:
    return InvalidArtifactError(
        f"{shown(name)} is a symbolic link. Copy the directory with the links resolved (cp -rL) and use the copy.",
        code="links_not_allowed",
    )


def _special_file_refused(name: str) -> InvalidArtifactError:
    return InvalidArtifactError(
        f"{shown(name)} is no regular file (FIFO, socket, device or directory). Remove it.",
        code="special_file_not_allowed",
    )
