"""Uploaded files: bytes on disk under ids the server made, checked before anybody can see them.

An upload is written to ``incoming/``, checked, flushed to the disk, and only then renamed to its id and
entered in the store; whatever goes wrong before that removes it. The client's file name is a label.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from registry.errors import InvalidDataError, InvalidRequestError, NotFoundError, StorageError, TooLargeError
from tune.jobs.check_file import check_training_file, row_format
from tune.jobs.file_store import FileStore, Order
from tune.jobs.idempotency import Idempotency
from tune.jobs.limits import MAX_FILE_BYTES as MAX_FILE_BYTES
from tune.jobs.limits import MAX_FILE_ROWS
from tune.jobs.limits import MAX_PART_BYTES as MAX_PART_BYTES
from tune.jobs.limits import MAX_UPLOAD_BYTES as MAX_UPLOAD_BYTES
from tune.jobs.records import FileRecord, Page
from tune.jobs.rows import new_id

MAX_FILENAME_CHARACTERS = 255
_STALE_SECONDS = 3600.0


class FileStorage:
    """A directory of immutable files named by id. Safe for several processes at once."""

    def __init__(
        self,
        directory: Path,
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_file_rows: int = MAX_FILE_ROWS,
        max_part_bytes: int = MAX_PART_BYTES,
        max_upload_bytes: int = MAX_UPLOAD_BYTES,
    ) -> None:
        self.max_file_bytes = max_file_bytes
        self.max_file_rows = max_file_rows
        self.max_part_bytes = max_part_bytes
        self.max_upload_bytes = max_upload_bytes
        self._directory = directory
        self._incoming = directory / "incoming"
        self._parts = directory / "parts"
        with _disk(f"create {self._incoming}"):
            self._incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._parts.mkdir(mode=0o700, exist_ok=True)

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file are. ``file_id`` is one that the store knows, never a client's text."""
        return self._directory / file_id

    def receive(self) -> Upload:
        """Start a new file."""
        return Upload(self._incoming / new_id("upload-"), self._directory, self.max_file_bytes)

    def assemble(self) -> Upload:
        """Start a new file that is put together of parts."""
        return Upload(self._incoming / new_id("upload-"), self._directory, self.max_upload_bytes)

    def receive_part(self, upload_id: str) -> Upload:
        """Start a part of a file; kept under its own id, until :meth:`remove_parts`."""
        directory = self._parts / upload_id
        with _disk(f"create {directory}"):
            directory.mkdir(mode=0o700, exist_ok=True)
        return Upload(self._incoming / new_id("part-"), directory, self.max_part_bytes, field="data")

    def part_path(self, upload_id: str, part_id: str) -> Path:
        """Both ids are ones that the store knows."""
        return self._parts / upload_id / part_id

    def remove_parts(self, upload_id: str) -> None:
        with _disk(f"remove the parts of {upload_id}"):
            shutil.rmtree(self._parts / upload_id, ignore_errors=True)

    def uploads_with_parts(self) -> set[str]:
        """Ids of uploads for which there is a directory."""
        return {path.name for path in self._parts.iterdir()}

    def remove(self, file_id: str) -> None:
        with _disk(f"remove {file_id}"):
            self.path(file_id).unlink(missing_ok=True)

    def sweep(self, known: set[str]) -> list[str]:
        """Remove what a killed process left: uploads nobody writes any more, and files without a row.

        Young ones stay, because their row may be about to be written. Returns the removed names.
        """
        removed = []
        for path in (*self._incoming.iterdir(), *self._directory.iterdir()):
            if path.is_dir() or path.name in known:
                continue
            if time.time() - path.stat().st_mtime > _STALE_SECONDS and not _is_locked(path):
                path.unlink(missing_ok=True)
                removed.append(path.name)
        return removed


class Upload:
    """One file being written. Leaving the ``with`` block without :meth:`keep` removes every byte.

    with storage.receive() as upload:
        upload.write(b"...")
        upload.keep("file-1")
    """

    def __init__(self, path: Path, directory: Path, max_bytes: int, *, field: str = "file") -> None:
        """``field``: of the request, for messages."""
        self.path = path
        self._field = field
        self.size_bytes = 0
        self._directory = directory
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        with _disk("start an upload"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._file = os.fdopen(descriptor, "wb")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells a sweep that somebody is at it

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # closing writes once more what a full disk has refused, and what is removed anyway
            self._file.close()
        self.path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Append. Raises :class:`TooLargeError` before the byte that would pass the limit is written."""
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            raise TooLargeError(
                f"{self._field!r} is larger than {self._max_bytes} bytes; split it or leave rows out",
                code="file_too_large",
                param=self._field,
            )
        self._hash.update(data)
        with _disk("write the upload"):
            self._file.write(data)

    def flush(self) -> None:
        """Make what was written visible to readers of :attr:`path`."""
        with _disk("write the upload"):
            self._file.flush()

    def keep(self, file_id: str) -> None:
        """Flush to the disk and give the file its lasting name."""
        with _disk("store the upload"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self.path.rename(self._directory / file_id)
            directory = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


class FileService:
    """The files API without HTTP. Methods block."""

    def __init__(self, store: FileStore, storage: FileStorage) -> None:
        self.storage = storage
        self._store = store

    def seen_by(self, tenant: str) -> FileService:
        """The same service as one tenant sees it: nobody else's files are there."""
        return FileService(self._store.seen_by(tenant), self.storage)

    def finish_upload(
        self,
        upload: Upload,
        *,
        filename: str,
        purpose: str,
        expires_after_seconds: int | None = None,
        idempotency_key: str | None = None,
    ) -> FileRecord:
        """Check what was received and make it a file; a repeated request gets the file it made.

        Raises:
            InvalidRequestError: a purpose or a name that cannot be.
            InvalidDataError: a row is wrong; ``line`` is the first one's, the message lists up to ten.
            TooLargeError: there are too many rows.
            ConflictError: the key made another file.
            StorageError: the disk refused.
        """
        asked = None
        if idempotency_key is not None:
            sent = json.dumps([filename, purpose, expires_after_seconds, upload.sha256]).encode()
            asked = Idempotency.of(idempotency_key, sent, making="file")
            if (made := self._store.made_by(asked)) is not None:
                return made
        record = self.checked(upload, filename=filename, purpose=purpose, expires_after_seconds=expires_after_seconds)
        upload.keep(record.id)
        try:
            kept = self._store.add(record, asked)
        except Exception:
            self.storage.remove(record.id)
            raise
        if kept.id != record.id:  # the same request at the same moment was first
            self.storage.remove(record.id)
        self.remove_expired()
        return kept

    def checked(self, upload: Upload, *, filename: str, purpose: str, expires_after_seconds: int | None) -> FileRecord:
        """The record of a file that has been received and can be used; nothing is kept yet. Raises as above."""
        check_purpose(purpose)
        check_filename(filename)
        tenant = self._store.tenant
        assert tenant is not None, "this is everybody's view of the files, and whose is this one?"
        upload.flush()
        rows = _checked_rows(upload.path, self.storage.max_file_rows)
        created_at = int(time.time())
        return FileRecord(
            id=new_id("file-"),
            tenant=tenant,
            filename=filename,
            purpose="fine-tune",
            size_bytes=upload.size_bytes,
            sha256=upload.sha256,
            rows=rows,
            created_at=created_at,
            row_format=row_format(upload.path),
            expires_at=None if expires_after_seconds is None else created_at + expires_after_seconds,
        )

    def file(self, file_id: str) -> FileRecord:
        return self._store.get(file_id)

    def files(self, *, after: str | None, limit: int, order: Order, purpose: str | None) -> Page[FileRecord]:
        return self._store.page(after=after, limit=limit, order=order, purpose=purpose)

    def open_content(self, file_id: str) -> BinaryIO:
        """For the caller to read and close, to its end also when the file is deleted meanwhile.

        Raises:
            NotFoundError: there is no such file, or it was deleted at this moment.
        """
        path = self.storage.path(self._store.get(file_id).id)
        try:
            return path.open("rb")
        except FileNotFoundError as error:
            raise NotFoundError(f"the content of {file_id} is gone: it was deleted, or has expired") from error

    def delete(self, file_id: str) -> None:
        """Remove the file. Raises :class:`ConflictError` while an open job needs it."""
        self._store.delete(file_id)
        self.storage.remove(file_id)

    def sweep(self) -> list[str]:
        """Clean up after killed processes; for the start of a server."""
        self.remove_expired()
        return self.storage.sweep(self._store.ids())

    def remove_expired(self) -> None:
        """Free the space of files that have expired; each upload does so."""
        for file_id in self._store.take_expired():
            self.storage.remove(file_id)


def _checked_rows(path: Path, max_rows: int) -> int:
    report = check_training_file(path, max_rows=max_rows)
    if report.rows > max_rows:
        raise TooLargeError(
            f"the file has more than {max_rows:,} rows, the most that are taken; leave some out, or split the "
            "file and train on its parts in several stages (capo.stages)",
            code="too_many_rows",
            param="file",
        )
    if not report.errors:
        return report.rows
    first = report.errors[0]
    reasons = "; ".join(error.reason for error in report.errors)
    raise InvalidDataError(
        f"the file cannot be used for fine-tuning: {reasons}",
        code="invalid_training_file",
        param="file",
        line=first.line,
    )


def check_purpose(purpose: str) -> None:
    if purpose != "fine-tune":
        raise InvalidRequestError(
            f"purpose {purpose[:80]!r} is not offered; the one purpose of an upload is 'fine-tune'",
            code="invalid_purpose",
            param="purpose",
        )


def check_filename(filename: str, *, param: str = "file") -> None:
    if not filename or len(filename) > MAX_FILENAME_CHARACTERS or not filename.isprintable():
        raise InvalidRequestError(
            f"the file's name must have 1 to {MAX_FILENAME_CHARACTERS} printable characters, got {filename[:40]!r}",
            code="invalid_filename",
            param=param,
        )


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextmanager
def _disk(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"could not {action}: {error.strerror or error}; free space or repair the disk") from error
